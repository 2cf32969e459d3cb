"""Models in a real MLflow registry: what is stored and loaded."""

import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from safetensors.torch import load_file
from support import servers
from support.tiny import TINY_NET

from ddpm.config.json import override
from ddpm.runs import checkpoint, names
from ddpm.tracking import registry
from ddpm.tracking.mlflow_run import RUN_KEY_TAG
from ddpm.training.state import State
from ddpm.utils.errors import UserError

CPU = torch.device("cpu")
TINY = override(
    TINY_NET,
    {
        "schedule.num_timesteps": 20,
        "model.num_classes": 3,
        "model.zero_init": False,
        "sample.num_sample_steps": 3,
        "run.experiment": "registry",
    },
)


@pytest.fixture
def mlflow(mlflow_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[MlflowClient]:
    """The server, set as MLFLOW_TRACKING_URI."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    yield MlflowClient(mlflow_server)


@pytest.fixture
def name() -> str:
    return f"digits-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of a run that MLflow may contain."""
    state = State.create(TINY, CPU)
    sum(p.square().sum() for p in state.net.parameters()).backward()  # type: ignore[union-attr]
    state.descend(TINY.optim.lr, bad=torch.tensor(False))
    state.step = 3
    state.images_seen = 3 * TINY.train.batch_size
    checkpoint.write(
        state.snapshot(TINY, {"run_key": uuid.uuid4().hex, "data_fingerprint": "f"}), tmp_path / "c"
    )
    return tmp_path / "c"


def run_of(client: MlflowClient, folder: Path) -> str:
    """A finished MLflow run of the checkpoint's run."""
    existing = client.get_experiment_by_name("registry")
    experiment_id = existing.experiment_id if existing else client.create_experiment("registry")
    key = checkpoint.read_state(folder)["run_key"]
    run = client.create_run(experiment_id, tags={RUN_KEY_TAG: key})
    client.set_terminated(run.info.run_id, "FINISHED")
    return run.info.run_id


@pytest.mark.lowest
def test_a_registered_model_is_found_by_its_alias(
    mlflow: MlflowClient, name: str, folder: Path, tmp_path: Path
) -> None:
    run_id = run_of(mlflow, folder)
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    model, where = registry.register(name, folder, {"diffusers": tmp_path / "pipeline"}, "champion")
    assert (model, where) == (f"models:/{name}/1", os.environ["MLFLOW_TRACKING_URI"])
    assert registry.register(name, folder, {})[0] == f"models:/{name}/2"
    version = mlflow.get_model_version_by_alias(name, "champion")
    assert (version.version, version.run_id) == ("1", run_id)
    assert mlflow.get_run(run_id).info.status == "FINISHED"

    with names.local_checkpoint(f"models:/{name}@champion") as found:
        back = checkpoint.load_net(found)
        assert checkpoint.read_state(found) == checkpoint.read_state(folder)
    assert not found.exists()
    assert back.config == TINY
    before = checkpoint.load_net(folder).net.state_dict()
    after = back.net.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    # It has no pickle and no code.
    local = Path(download_artifacts(artifact_uri=model, dst_path=str(tmp_path / "model")))
    files = {str(path.relative_to(local)) for path in local.rglob("*") if path.is_file()}
    stored = {f"artifacts/checkpoint/{file}" for file in checkpoint.FILES}
    assert files == stored | {"artifacts/diffusers/model_index.json"}
    assert load_file(local / "artifacts/checkpoint/optimizer.safetensors") == {}


def test_a_missing_model_is_a_one_line_error(mlflow: MlflowClient, name: str) -> None:
    for uri in (f"models:/{name}@champion", f"models:/{name}/1", "models:/", f"models:/{name}"):
        with pytest.raises(UserError, match=r"^MLflow at http") as caught, names.local_checkpoint(uri):
            pass
        assert "\n" not in str(caught.value)


def test_an_unreachable_mlflow_is_a_one_line_error(
    mlflow: MlflowClient, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (port,) = servers.free_ports(1)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@{servers.LOOPBACK}:{port}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UserError, match=f"^MLflow at http://{servers.LOOPBACK}:{port}: ") as caught:
        registry.register(name, folder, {})
    assert "secret" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("store", ["server", "sqlite"])
def test_an_exported_net_is_registered_and_sampled_from(
    store: str, mlflow_server: str, name: str, folder: Path, tmp_path: Path, run_job: Callable[..., Any]
) -> None:
    uri = mlflow_server if store == "server" else f"sqlite:///{tmp_path}/mlflow.db"
    env = {"MLFLOW_TRACKING_URI": uri}
    words = (folder, tmp_path / "exported", "--label", 3, "--register", name, "--alias", "champion")
    done = run_job("export", *words, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"model       models:/{name}/1 in {uri}"

    for source, drawn in ((f"models:/{name}@champion", "registered"), (folder, "ours")):
        words = (source, "--num-images", 4, "--seed", 7, "--out", tmp_path / drawn)
        done = run_job("sample", *words, env=env)
        assert done.returncode == 0, done.stderr
    images = [file.name for file in (tmp_path / "ours/images").iterdir()]
    assert len(images) == 4
    for image in images:
        registered, ours = (tmp_path / drawn / "images" / image for drawn in ("registered", "ours"))
        assert registered.read_bytes() == ours.read_bytes()
