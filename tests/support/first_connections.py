"""First connections to an MLflow database, for processes that tests stop: a module, since those import it."""

from ddpm.tracking import mlflow_client


def connect(uri: str) -> None:
    mlflow_client.connect(uri)


def create_experiment(uri: str, name: str) -> None:
    mlflow_client.connect(uri).create_experiment(name)
