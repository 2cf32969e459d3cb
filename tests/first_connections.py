"""First connections to an MLflow database, for processes that tests stop: a module, since those import it."""

from ddpm import tracking


def connect(uri: str) -> None:
    tracking.connect(uri)


def create_experiment(uri: str, name: str) -> None:
    tracking.connect(uri).create_experiment(name)
