"""MLflow's model registry: a checkpoint under a name.

A registered model holds

    artifacts/checkpoint/    our checkpoint, without the optimizer's state
    artifacts/diffusers/     or pt2/: the exported net, for users of other software

It contains no pickle and no code.
"""

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from ddpm.runs import checkpoint
from ddpm.runs.names import MODELS
from ddpm.tracking import mlflow_client, mlflow_run
from ddpm.utils.retry import as_user_error

FOLDER = "artifacts"
"""Folder of what we store in a model."""


def register(
    name: str, folder: Path, exported: Mapping[str, Path], alias: str | None = None
) -> tuple[str, str]:
    """Store the checkpoint in `folder` as the next version of the model `name`, linked to its MLflow run.

    Args:
        exported: exported nets to include, by format.
        alias: a name that points to this version from now on, as in models:/NAME@ALIAS.

    Returns:
        models:/NAME/VERSION, and MLflow's URI.
    """
    uri = mlflow_client.tracking_uri()
    config = checkpoint.read_config(folder)
    state = checkpoint.read_state(folder)
    with tempfile.TemporaryDirectory(prefix="ddpm-model-") as staging:
        with as_user_error(f"cannot assemble the model in {staging}"):
            checkpoint.write_net(checkpoint.load_net(folder), state, Path(staging, "checkpoint"))
            for kind, path in exported.items():
                shutil.copytree(path, Path(staging, kind))
        with mlflow_client.opened() as mlflow:
            from mlflow import register_model

            client = mlflow.client
            run_key = state.get("run_key")
            experiment_id = mlflow_run.experiment_id(mlflow, config.run.experiment)
            run = mlflow_run.find(mlflow, config.run.experiment, run_key) if run_key else None
            run_id = run.info.run_id if run else None
            model = client.create_logged_model(experiment_id, "ddpm", source_run_id=run_id)
            client.log_model_artifacts(model.model_id, staging, FOLDER)
            client.finalize_logged_model(model.model_id, "READY")
            version = register_model(model.model_uri, name).version
            if alias is not None:
                client.set_registered_model_alias(name, alias, version)
    return f"{MODELS}{name}/{version}", mlflow_client.without_password(uri)


def download(uri: str, folder: Path) -> Path:
    """Download the checkpoint of the model `uri`, models:/NAME@ALIAS or models:/NAME/VERSION, to `folder`."""
    with mlflow_client.opened():
        from mlflow.artifacts import download_artifacts

        artifact = f"{uri.rstrip('/')}/{FOLDER}/checkpoint"
        return Path(download_artifacts(artifact_uri=artifact, dst_path=str(folder)))
