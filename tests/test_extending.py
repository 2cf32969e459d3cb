"""docs/design/extending.md: a package outside the tree adds one of each kind, and a config.json brings no code."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import processes

from ddpm.config import kinds
from ddpm.config.json import from_json
from ddpm.data import prepare_for_run
from ddpm.utils.errors import UserError

DOC = (processes.REPO / "docs/design/extending.md").read_text()
ADDED = {
    "schedule.kind": "constant",
    "objective.process": "l1",
    "sample.sampler": "euler",
    "model.net": "mlp",
    "data.source": "stripes",
    "features": "grey",
}
LOADED = f"""
from ddpm.config import kinds
for field, name in {ADDED}.items():
    assert kinds.names(field)[-1] == name
    kinds.find(field, name).load()
"""
FIRST_LINE = re.compile(r"# (?P<name>\S+)\n")


def write_package(folder: Path) -> None:
    """Write the page's files, each a block of code that begins with its name."""
    for text in re.findall(r"^```\w+\n(.*?)^```$", DOC, re.MULTILINE | re.DOTALL):
        named = FIRST_LINE.match(text)
        if named is not None:
            file = folder / named["name"]
            file.parent.mkdir(exist_ok=True)
            file.write_text(text.removeprefix(named[0]))


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the page's package, which is not installed: its metadata lies beside it."""
    folder = tmp_path_factory.mktemp("my-ddpm")
    write_package(folder)
    return folder


@pytest.fixture
def env(package: Path) -> dict[str, str]:
    return {"PYTHONPATH": f"{package}:{processes.REPO}"}


def test_the_package_adds_a_name_to_each_table(tmp_path: Path, env: dict[str, str]) -> None:
    done = processes.run([sys.executable, "-c", LOADED], cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr


def test_the_package_can_be_installed(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    write_package(source)
    words = "-m pip install --quiet --no-deps --no-index --no-build-isolation --disable-pip-version-check"
    command = [sys.executable, *words.split(), "--target", tmp_path / "site", "."]
    done = processes.run(command, cwd=source)
    assert done.returncode == 0, done.stdout + done.stderr
    env = {"PYTHONPATH": f"{tmp_path}/site:{processes.REPO}"}
    done = processes.run([sys.executable, "-c", LOADED], cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr


def test_names_and_flags_of_the_package_are_in_the_help(
    run_job: Callable[..., Any], tmp_path: Path, env: dict[str, str]
) -> None:
    shown = run_job("train", "digits", "--model.net", "mlp", "--help-all", cwd=tmp_path, env=env)
    text = " ".join(shown.stdout.replace("│", " ").split())
    assert "--model.hidden" in text and "--model.base-width" not in text
    assert ",geometric,constant}" in text and ",euler}" in text
    assert "grey}" in run_job("evaluate", "--help", cwd=tmp_path, env=env).stdout


@pytest.mark.parametrize(
    "words",
    [
        "train digits --schedule constant",
        "train digits --objective.process l1",
        "train digits --sampler euler",
        "train digits --model.net mlp",
        "train digits --data.source stripes",
        "evaluate a --features grey",
        "prepare stripes more",
    ],
)
def test_names_are_refused_without_the_package(user_error: Callable[..., str], words: str) -> None:
    assert words.split()[-1 if "prepare" not in words else 1] in user_error(*words.split())


def test_settings_follow_from_what_a_kind_reads(
    run_job: Callable[..., Any], tmp_path: Path, env: dict[str, str]
) -> None:
    script = """
from ddpm.config.json import override
from ddpm.config.presets import DIGITS
from ddpm.tracking.run_params import params
config = {"schedule.kind": "constant", "objective.process": "l1", "sample.sampler": "euler"}
found = params(override(DIGITS, config))
assert "schedule.beta_end" in found and "schedule.beta_start" not in found
assert "sample.clip_x_0" in found and "sample.eta" not in found
assert "objective.weight" not in found
"""
    done = processes.run([sys.executable, "-c", script], cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    words = ["train", "digits", "--model.net", "mlp", "--model.num-classes", "2"]
    refused = run_job(*words, cwd=tmp_path, env=env)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: model: num_classes and process must be")


@pytest.mark.slow
def test_the_package_is_used_from_data_to_evaluation(
    run_job: Callable[..., Any], tmp_path: Path, env: dict[str, str]
) -> None:
    env = env | {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}

    def run(*words: str) -> str:
        done = run_job(*words, cwd=tmp_path, env=env)
        assert done.returncode == 0, done.stderr
        return str(done.stdout)

    assert "train       512 images" in run("prepare", "stripes", "shards", "--size", "8")
    chosen = "--model.net mlp --schedule constant --objective.process l1 --sampler euler"
    run(*f"train digits --data shards --name a --total-images 512 {chosen}".split())
    run(*"sample runs/a --num-images 4 --num-sample-steps 5 --out drawn".split())
    assert (tmp_path / "drawn/grid.png").is_file()
    assert "grey" in run(*"evaluate runs/a --features grey --num-images 64 --num-draws 2".split())
    missing = run_job("sample", "runs/a", "--out", "more", cwd=tmp_path)
    assert missing.returncode == 2
    assert re.search(r"config\.json: \S+ is '\w+'; .* installed package", missing.stderr)


@pytest.mark.parametrize(
    "name", ["trap", "trap:Net", "trap.Net", "os", "os:system", "..", "", 1, ["unet"], None]
)
def test_a_config_imports_only_registered_plugins(
    name: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module of this name is importable, but it is not registered as a plugin."""
    (tmp_path / "trap.py").write_text("raise SystemExit('executed')")
    monkeypatch.syspath_prepend(tmp_path)
    text = json.dumps({"model": {"net": name}})
    with pytest.raises(UserError, match=r"^config\.json: model\.net is "):
        from_json(text)
    for key in ("schedule.kind", "objective.process", "sample.sampler"):
        group, field = key.split(".")
        with pytest.raises(UserError, match=rf"^config\.json: {key} is "):
            from_json(json.dumps({group: {field: name}}))
    source = name if isinstance(name, str) else None
    with pytest.raises(UserError, match="no images are given" if source is None else "data.source is "):
        prepare_for_run.source_named(source)
    assert "trap" not in sys.modules


def test_a_broken_plugin_is_an_error_with_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entered = "[ddpm.nets]\nlost = no_such_module:Net\nodd = json:loads\n"
    (tmp_path / "odd-1.0.dist-info").mkdir()
    (tmp_path / "odd-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: odd\nVersion: 1.0\n")
    (tmp_path / "odd-1.0.dist-info/entry_points.txt").write_text(entered)
    monkeypatch.syspath_prepend(tmp_path)
    assert kinds.names("model.net")[-2:] == ["lost", "odd"]
    with pytest.raises(UserError, match=r"'lost' of the package odd .*ModuleNotFoundError"):
        from_json('{"model": {"net": "lost"}}')
    with pytest.raises(UserError, match=r"'odd' of the package odd must be a ddpm\.config\.kinds\.Kind"):
        from_json('{"model": {"net": "odd"}}')
