"""First connections to an MLflow database, for processes that tests stop: a module, since those import it."""

from ddpm.tracking import mlflow_runs


def connect(uri: str) -> None:
    mlflow_runs.connect(uri)


def create_experiment(uri: str, name: str) -> None:
    mlflow_runs.connect(uri).create_experiment(name)
