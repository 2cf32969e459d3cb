"""Fixtures: real servers, a browser, jobs; and the isolation of tests from each other and from the user."""

import importlib
import os
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
import pytest
from support import processes, servers

if TYPE_CHECKING:
    from support import faulted

    from ddpm.config.tree import Config
    from ddpm.data.reading import DataSet

CHROMIUM = Path("/usr/bin/chromium")
CHROMIUM_FLAGS = """--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync""".split()
ENV = {
    # Several test processes share the machine, each with its own workers.
    "OMP_NUM_THREADS": "1",
    # An OpenMP thread that waits for others leaves its core free.
    "OMP_WAIT_POLICY": "passive",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray Train's controller polls its workers five times a second instead of every two seconds.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "HF_HUB_OFFLINE": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "120",  # a busy machine's server may be slow
    # A process that crashes prints a traceback.
    "PYTHONFAULTHANDLER": "1",
}
UNSET = """RAY_ADDRESS AWS_PROFILE DDPM_CLUSTER_RESOURCES DDPM_STORAGE MLFLOW_TRACKING_URI MLFLOW_RUN_ID
    MLFLOW_EXPERIMENT_NAME""".split()
RAY_FOLDER = tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True)


def pytest_configure() -> None:
    """Set the environment before torch and ray are imported: both read some of it at import."""
    os.environ.update(ENV)
    # Clusters of other tests and of the user must not be found. Short: socket paths have at most 107 characters.
    os.environ["RAY_TMPDIR"] = RAY_FOLDER.name
    os.environ["HF_HOME"] = f"{RAY_FOLDER.name}/huggingface"
    os.environ["DDPM_CACHE"] = f"{RAY_FOLDER.name}/digests"
    for name in UNSET:
        os.environ.pop(name, None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Any:
    """Turn skips into failures in CI, where everything is installed and no test may be skipped."""
    report = yield
    if os.environ.get("CI") == "true" and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"no test may be skipped in CI. {reason}"
    return report


pytest_make_collect_report = pytest_runtest_makereport  # a module may be skipped as a whole


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run slow tests first, half of them in each of two processes: the quick ones balance the end.

    With --dist worksteal, pytest-xdist gives each process one half of the list.
    """
    slow = [item for item in items if item.get_closest_marker("slow")]
    quick = [item for item in items if not item.get_closest_marker("slow")]
    half_slow = len(slow) // 2
    half_quick = len(items) // 2 - len(slow) // 2
    items[:] = slow[:half_slow] + quick[:half_quick] + slow[half_slow:] + quick[half_quick:]


@pytest.fixture(autouse=True)
def own_folder(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each test runs in its own folder: relative paths and runs; all tests log to one local MLflow database."""
    monkeypatch.chdir(tmp_path)
    # One database for all tests, since creating one takes seconds.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path_factory.getbasetemp() / 'mlflow.db'}")


@pytest.fixture(autouse=True, scope="module")
def ray_is_left() -> Iterator[None]:
    """Tests that join a cluster in this process leave it: those of other modules would be in it, too."""
    yield
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        ray.shutdown()
        pytest.fail("Ray is still initialized in the process of the tests")


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.S3Server]:
    with servers.S3Server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def s3_bucket(s3_server: servers.S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URI of a bucket that exists for one test; the environment points boto3 and pyarrow to its server."""
    import boto3

    s3_server.use(monkeypatch)
    client = boto3.client("s3")
    bucket = f"test-{uuid.uuid4().hex[:12]}"
    client.create_bucket(Bucket=bucket)
    yield f"s3://{bucket}"
    client.delete_bucket(Bucket=bucket)  # with its objects, which real S3 refuses
    client.close()


@pytest.fixture(params=["local", "s3"])
def root_uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder that does not exist yet, on disk and in a bucket."""
    where = tmp_path if request.param == "local" else request.getfixturevalue("s3_bucket")
    return f"{where}/root"


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URI of an MLflow server."""
    with servers.MlflowServer(tmp_path_factory.mktemp("mlflow")) as server:
        yield server.uri


@pytest.fixture(scope="session")
def ray_head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.RayHead]:
    with servers.RayHead(tmp_path_factory.mktemp("ray")) as head:
        yield head


@pytest.fixture(scope="session")
def digits_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """URI of scikit-learn's digits as shards."""
    from support import faulted

    return faulted.write_digits(tmp_path_factory.mktemp("digits"))


@pytest.fixture
def tiny(digits_uri: str) -> "Config":
    """A config with a few thousand weights, 8 steps of 32 images in 4 micro-batches."""
    import torch

    from ddpm.config.json import override
    from ddpm.config.presets import DIGITS

    torch.set_num_threads(1)
    return override(
        DIGITS,
        {
            "data.shards": digits_uri,
            "data.window_rows": 200,
            "schedule.num_timesteps": 50,
            "model.base_width": 8,
            "model.width_multipliers": [1, 2],
            "model.norm_groups": 4,
            "optim.lr": 2e-3,
            "optim.lr_warmup_images": 64,
            "train.total_images": 256,
            "train.batch_size": 32,
            "train.micro_batch_size": 8,
            "train.log_every_images": 64,
            "train.checkpoint_every_images": 128,
            "train.sample_every_images": 128,
            "train.held_out_images": 40,
            "sample.num_images": 4,
            "sample.num_sample_steps": 5,
            "cluster.num_workers": 1,
        },
    )


@pytest.fixture
def train_set(tiny: "Config") -> "DataSet":
    from ddpm.data.ray_stream import open_configured

    return open_configured(tiny)


@pytest.fixture(scope="session")
def common_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all pytest processes, for what is made once; a file lock in it says by whom."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session")
def undisturbed(digits_uri: str, ray_head: servers.RayHead, common_folder: Path) -> "faulted.Run":
    """A finished run of two workers without any fault: one for all pytest processes."""
    from support import faulted

    run = faulted.Run("undisturbed", str(common_folder), digits_uri, common_folder / "undisturbed.log")
    with filelock.FileLock(common_folder / "undisturbed.lock"):
        if run.images_seen() < faulted.TOTAL:
            env = {
                "MLFLOW_TRACKING_URI": f"sqlite:///{common_folder}/undisturbed.db",
                "RAY_ADDRESS": ray_head.address,
            }
            with run.start(env=env) as job:
                assert job.wait() == 0, job.output
    return run


@pytest.fixture
def on_ray_head(ray_head: servers.RayHead, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs of this test join the running cluster instead of starting one; Ray Train's state tracking and preemption
    watcher are off, which saves a process each."""
    monkeypatch.setenv("RAY_ADDRESS", ray_head.address)
    monkeypatch.setenv("RAY_TRAIN_ENABLE_STATE_TRACKING", "0")
    monkeypatch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")


@pytest.fixture(scope="module")
def ray_here() -> Iterator[None]:
    """A Ray cluster on this machine, joined by this process; its workers can import the modules of tests/."""
    import ray

    from ddpm.cluster.ray_init import connect

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(*processes.python_path(processes.REPO / "tests").popitem())
        patch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # as `connect` does, but undone afterwards
        connect()
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium, as Playwright's Browser.

    Module scope, not session scope: while it is open, Playwright runs an event loop in this thread, and asyncio.run()
    fails.
    """
    from playwright.sync_api import sync_playwright

    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is missing; `apt-get install chromium` brings it")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_FLAGS, timeout=300_000)
        yield chromium
        chromium.close()


@pytest.fixture
def run_job() -> Callable[..., Any]:
    """`python jobs/{job}.py ...`: run_job("train", "digits", "--run.storage", tmp_path)."""
    return processes.run_job


@pytest.fixture
def on_path(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Put the folder of an example on this process's path: what it registers is found, though it is not installed."""
    return lambda name: monkeypatch.syspath_prepend(processes.REPO / "examples" / name)


@pytest.fixture
def user_error(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """The line by which a job refuses a command line, in this process: user_error("train", "digits", "--lr", "a")."""

    def message(job: str, *words: str) -> str:
        from ddpm.utils.errors import UserError

        monkeypatch.setattr(sys, "argv", [f"{job}.py", *words])
        monkeypatch.setenv("COLUMNS", "80")
        with pytest.raises(UserError) as raised:
            importlib.import_module(f"ddpm.cli.{job}").main()
        assert raised.value.exit_code == 2 and "\n" not in str(raised.value)
        return str(raised.value)

    return message
