"""Models in a real MLflow registry: what is stored, loaded and served."""

import base64
import json
import os
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.models import Model
from safetensors.torch import load_file
from support import servers
from support.processes import program
from support.tiny import TINY_NET

from ddpm.checkpoints import checkpoint
from ddpm.config_io import override
from ddpm.hub import registry, resolve
from ddpm.tracking.mlflow_runs import RUN_KEY_TAG
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
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "")  # undone afterwards
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
    state.step, state.images_seen = 3, 3 * TINY.train.batch_size
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

    with resolve.local_checkpoint(f"models:/{name}@champion") as found:
        back = checkpoint.load_net(found)
        assert checkpoint.read_state(found) == checkpoint.read_state(folder)
    assert not found.exists()
    assert back.config == TINY
    before, after = checkpoint.load_net(folder).net.state_dict(), back.net.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    # It has a signature and no pickle.
    local = Path(download_artifacts(artifact_uri=model, dst_path=str(tmp_path / "model")))
    files = {str(path.relative_to(local)) for path in local.rglob("*") if path.is_file()}
    assert {"artifacts/diffusers/model_index.json", "serving.py", "code/ddpm/sampling/generate.py"} <= files
    assert {f"artifacts/checkpoint/{file}" for file in checkpoint.FILES} <= files
    suffixes = {Path(file).suffix for file in files}
    assert suffixes <= {".py", ".html", ".js", ".json", ".md", ".safetensors", ".yaml", ".txt", ".typed", ""}
    assert load_file(local / "artifacts/checkpoint/optimizer.safetensors") == {}
    card = Model.load(local)
    assert card.signature.inputs.to_dict()[0]["properties"].keys() == {"num_images", "seed", "label"}
    assert json.loads((local / "input_example.json").read_text()) == registry.EXAMPLE
    needed = (local / "requirements.txt").read_text()
    assert all(f"{package}==" in needed for package in ("torch", "mlflow", "safetensors"))
    assert "+cpu" not in needed


def test_a_missing_model_is_a_one_line_error(mlflow: MlflowClient, name: str) -> None:
    for uri in (f"models:/{name}@champion", f"models:/{name}/1", "models:/", f"models:/{name}"):
        with pytest.raises(UserError, match=r"^MLflow at http") as caught, resolve.local_checkpoint(uri):
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
def test_mlflow_serves_the_same_images_as_the_sample_job(
    mlflow: MlflowClient, name: str, folder: Path, tmp_path: Path, run_job: Callable[..., Any]
) -> None:
    out = tmp_path / "program"
    done = run_job("export", folder, out, "--format", "pt2", "--register", name, "--alias", "champion")
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.splitlines()[-1] == f"model       models:/{name}/1 in {os.environ['MLFLOW_TRACKING_URI']}"
    )
    assert done.stdout.splitlines()[0] == f"program     {out}/net.pt2"
    net = checkpoint.load_net(folder).net
    arguments = torch.randn(3, 1, 8, 8), torch.tensor([0, 5, 19]), torch.tensor([0, 2, 3])
    program = torch.export.load(out / "net.pt2").module()
    assert (program(*arguments) - net(*arguments)).abs().max() < 1e-5

    uri = f"models:/{name}@champion"
    done = run_job("sample", uri, "--num-images", 4, "--seed", 7, "--out", tmp_path / "drawn")
    assert done.returncode == 0, done.stderr

    with served(uri, tmp_path / "served") as url:
        answer = requests.post(
            f"{url}/invocations", json={"inputs": [{"num_images": 4, "seed": 7}]}, timeout=300
        )
        assert answer.status_code == 200, answer.text
        served_images = answer.json()["predictions"]
        assert [encoded["index"] for encoded in served_images] == [0, 1, 2, 3]
        for encoded in served_images:
            drawn = tmp_path / f"drawn/images/{encoded['index']:06d}.png"
            assert base64.b64decode(encoded["png"]) == drawn.read_bytes()
        assert len({encoded["png"] for encoded in served_images}) == 4
        one = {"num_images": 1, "seed": 0}
        wrong: list[tuple[list[dict[str, Any]], str]] = [
            ([one | {"num_images": 0}], "num_images"),
            ([one, one | {"label": 3}], "label is 3; it must be in 0..2"),
            ([one | {"num_images": "many"}], "num_images"),
            ([{"seed": 0}], "num_images"),
            ([one | {"num_image": 2}], "num_image"),
            (
                [one | {"num_images": 4096}, one],
                "the requests ask for 4097 images together; the limit is 4096",
            ),
            ([one | {"num_images": 64}] * 65, "the requests ask for 4160 images together"),
        ]
        for request, message in wrong:
            answer = requests.post(f"{url}/invocations", json={"inputs": request}, timeout=300)
            assert answer.status_code == 400, answer.text
            assert message in answer.text, (message, answer.text)
        answer = requests.post(f"{url}/invocations", json={"inputs": [one | {"label": 2}, one]}, timeout=300)
        assert [encoded["index"] for encoded in answer.json()["predictions"]] == [0, 0]


@contextmanager
def served(uri: str, folder: Path) -> Iterator[str]:
    """Run `mlflow models serve` while the context is open."""
    (port,) = servers.free_ports(1)
    url = f"http://{servers.LOOPBACK}:{port}"
    command = [program("mlflow"), "models", "serve", "--model-uri", uri, "--env-manager", "local"]
    command += ["--host", servers.LOOPBACK, "--port", str(port), "--workers", "1"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # it starts uvicorn
    with servers.Server("served", command, f"{url}/ping", folder, {"PATH": path}):
        yield url
