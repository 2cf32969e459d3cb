"""First connections to an MLflow database: targets for processes that tests kill, which import this module."""

from ddpm.tracking import mlflow_client


def connect(uri: str) -> None:
    mlflow_client.connect(uri)


def create_experiment(uri: str, name: str) -> None:
    mlflow_client.connect(uri).create_experiment(name)
