"""MLflow's model registry: a checkpoint under a name, for serving and sampling.

A registered model holds

    artifacts/checkpoint/    our checkpoint, without the optimizer's state
    artifacts/diffusers/     or pt2/: the exported net, for users of other software
    serving.py  code/ddpm/   a copy of the code that MLflow runs to serve it (models from code)

It contains no pickle. We download only the checkpoint, and run none of that code.
"""

import os
import shutil
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ddpm.build import build_sampler
from ddpm.checkpoints import checkpoint
from ddpm.tracking import mlflow_client, mlflow_runs
from ddpm.utils.retry import as_user_error

SCHEME = "models:/"
PACKAGE = Path(__file__).parent.parent
NEEDED = tuple(
    "annotated-types numpy pillow pyarrow pydantic safetensors simplejpeg tenacity torch tyro".split()
)
"""Packages that ddpm.hub.serving and its imports need."""
EXAMPLE = [{"num_images": 2, "seed": 0}]


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
    build_sampler(checkpoint.read_config(folder))
    with tempfile.TemporaryDirectory(prefix="ddpm-model-") as staging:
        with as_user_error(f"cannot assemble the model in {staging}"):
            position = checkpoint.read_state(folder)
            checkpoint.write_net(checkpoint.load_net(folder), position, Path(staging, "checkpoint"))
            for kind, path in exported.items():
                shutil.copytree(path, Path(staging, kind))
        artifacts = {path.name: str(path) for path in Path(staging).iterdir()}
        with mlflow_client.opened() as client:
            number = _log(client, name, folder, artifacts)
            if alias is not None:
                client.set_registered_model_alias(name, alias, number)
    return f"{SCHEME}{name}/{number}", mlflow_client.without_password(mlflow_client.tracking_uri())


def download(uri: str, folder: Path) -> Path:
    """Download the checkpoint of the model `uri`, models:/NAME@ALIAS or models:/NAME/VERSION, to `folder`."""
    with mlflow_client.opened():
        from mlflow.artifacts import download_artifacts

        artifact = f"{uri.rstrip('/')}/artifacts/checkpoint"
        return Path(download_artifacts(artifact_uri=artifact, dst_path=str(folder)))


def _log(client: Any, name: str, folder: Path, artifacts: dict[str, str]) -> int:
    """Log the model, linked to MLflow's run of the checkpoint in `folder` if there is one, and register it."""
    from mlflow import pyfunc
    from mlflow.models import Model

    config, uri = checkpoint.read_config(folder), mlflow_client.tracking_uri()
    experiment_id = mlflow_runs.experiment_id(client, uri, config.run.experiment)
    run_key = checkpoint.read_state(folder).get("run_key")
    run = mlflow_runs.find_run(client, config.run.experiment, run_key) if run_key else None
    os.environ["MLFLOW_EXPERIMENT_ID"] = experiment_id
    stored = Model.log(
        None,
        pyfunc,
        name="ddpm",
        run_id=run.info.run_id if run else None,
        registered_model_name=name,
        python_model=str(PACKAGE / "hub" / "serving.py"),
        code_paths=[str(PACKAGE)],
        artifacts=artifacts,
        input_example=EXAMPLE,
        pip_requirements=[f"{package}=={version(package).partition('+')[0]}" for package in NEEDED],
    )
    return stored.registered_model_version
