"""docs/extending.md: its diffs add what it claims, and its plugin package works from outside the repository."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import processes

from ddpm.config_io import from_json
from ddpm.data import catalog
from ddpm.utils import plugins
from ddpm.utils.errors import UserError

DOC = (processes.REPO / "docs/extending.md").read_text()

ADDED = """
import sys
import torch
import tyro
from ddpm import build
from ddpm.config import Config
from ddpm.config_io import override
from ddpm.evaluation import nets
from ddpm.search.default_space import DEFAULT
from ddpm.search.space import KINDS

words = "--schedule.kind constant --objective.process late_mix --sample.num-sample-steps 3".split()
words += "--model.image-size 8 --model.base-width 8 --model.norm-groups 4 --model.attention-resolutions 2".split()
late = tyro.cli(Config, args=words)
net, objective = build.build_net(late), build.build_objective(late)
assert type(objective).__name__ == "LateMix" and not net.time_conditional
x = build.build_sampler(late)(lambda x_t, t: objective.denoise(net, x_t, t, None), lambda: torch.ones(2, 3, 8, 8))
assert x.shape == (2, 3, 8, 8)
euler = override(Config(), {"sample.sampler": "euler", "schedule.kind": "constant"})
build.build_sampler(euler)
assert KINDS["schedule.beta_end"] == ("constant", "linear", "scaled_linear") and "constant|linear" in DEFAULT[0]
assert nets.build("grey", None, None).features(torch.zeros(3, 8, 8, 1, dtype=torch.uint8)).shape == (3, 4)

import test_tables
for names, table in test_tables.test_every_choice_can_be_built.pytestmark[0].args[1]:
    test_tables.test_every_choice_can_be_built(names, table)
test_tables.test_every_process_has_a_sampler()
"""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", DOC, re.MULTILINE | re.DOTALL)


def apply(diff: str, root: Path) -> None:
    """Apply a diff: the old lines of each hunk must be in the file exactly once."""
    for part in re.split(r"^\+\+\+ ", diff, flags=re.MULTILINE)[1:]:
        name, _, hunks = part.partition("\n")
        file = root / name
        for hunk in hunks.split("@@\n"):
            lines = hunk.splitlines()
            old, new = (
                "\n".join(line[1:] for line in lines if line[:1] in (" ", sign)) for sign in ("-", "+")
            )
            if not file.exists():
                file.write_text(f"{new}\n")
                continue
            text = file.read_text()
            assert text.count(f"\n{old}") == 1, f"{name} has not once:\n{old}"
            file.write_text(text.replace(f"\n{old}", f"\n{new}"))


def test_the_additions_of_the_diffs_can_be_selected(tmp_path: Path) -> None:
    shutil.copytree(processes.REPO / "ddpm", tmp_path / "ddpm", ignore=shutil.ignore_patterns("__pycache__"))
    for diff in blocks("diff"):
        apply(diff, tmp_path)
    path = [tmp_path, processes.REPO / "tune", processes.REPO / "tests"]
    done = processes.run(
        [sys.executable, "-c", ADDED], cwd=tmp_path, env={"PYTHONPATH": ":".join(map(str, path))}
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's package, installed in its own folder."""
    source, site = tmp_path_factory.mktemp("my-ddpm"), tmp_path_factory.mktemp("site")
    for text in blocks("toml") + blocks("python"):
        file = source / text.partition("\n")[0].removeprefix("# ")
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    words = "-m pip install --quiet --no-deps --no-index --no-build-isolation --disable-pip-version-check"
    command = [sys.executable, *words.split(), "--target", site, "."]
    done = processes.run(command, cwd=source)
    assert done.returncode == 0, done.stdout + done.stderr
    return site


@pytest.fixture
def env(package: Path) -> dict[str, str]:
    return {"PYTHONPATH": f"{package}:{processes.REPO}"}


def test_an_external_source_is_prepared(
    run_job: Callable[..., Any], tmp_path: Path, env: dict[str, str]
) -> None:
    done = run_job("prepare", "stripes", "shards", "--size", "8", cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert "train       512 images" in done.stdout
    assert (tmp_path / "shards/manifest.json").is_file()
    refused = run_job("prepare", "stripes", "more", cwd=tmp_path)
    assert refused.returncode == 2 and "stripes" in refused.stderr


def test_an_external_net_has_its_own_flags(
    run_job: Callable[..., Any], tmp_path: Path, env: dict[str, str]
) -> None:
    shown = run_job("train", "digits", "--model.net", "mlp", "--help-all", cwd=tmp_path, env=env)
    assert "--model.hidden" in shown.stdout and "--model.base-width" not in shown.stdout
    words = ["train", "digits", "--model.net", "mlp", "--model.num-classes", "2"]
    refused = run_job(*words, cwd=tmp_path, env=env)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: model: num_classes and process must be")
    unknown = run_job("train", "digits", "--model.net", "mlp", cwd=tmp_path)
    assert unknown.returncode == 2
    assert unknown.stderr == (
        "error: config: model: net is 'mlp'; it must be one of 'unet', 'dit', or a net of an installed package\n"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_external_net_is_trained_on_an_external_source_and_sampled(
    run_job: Callable[..., Any], tmp_path: Path, env: dict[str, str]
) -> None:
    env = env | {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
    words = "--model.net mlp --data.source stripes --run.name a --train.total-images 512"
    done = run_job("train", "digits", *words.split(), cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    words = "--num-images 4 --num-sample-steps 5 --out drawn"
    drawn = run_job("sample", "runs/a", *words.split(), cwd=tmp_path, env=env)
    assert drawn.returncode == 0, drawn.stderr
    assert (tmp_path / "drawn/grid.png").is_file()
    missing = run_job("sample", "runs/a", "--out", "more", cwd=tmp_path)
    assert missing.returncode == 2
    assert re.search(r"config.json: model: net is 'mlp'; .* of an installed package$", missing.stderr)


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
    with pytest.raises(UserError, match=r"^config\.json: model: net is "):
        from_json(text)
    source = name if isinstance(name, str) else None
    with pytest.raises(UserError, match="no images are given" if source is None else "is not built in"):
        catalog.named(source)
    assert "trap" not in sys.modules


def test_a_broken_plugin_is_an_error_with_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entered = "[ddpm.nets]\nlost = no_such_module:Net\nodd = json:loads\n"
    (tmp_path / "odd-1.0.dist-info").mkdir()
    (tmp_path / "odd-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: odd\nVersion: 1.0\n")
    (tmp_path / "odd-1.0.dist-info/entry_points.txt").write_text(entered)
    monkeypatch.syspath_prepend(tmp_path)
    assert plugins.names("ddpm.nets") == ["lost", "odd"]
    with pytest.raises(UserError, match=r"'lost' of the package odd .*ModuleNotFoundError"):
        from_json('{"model": {"net": "lost"}}')
    with pytest.raises(UserError, match=r"'odd' must be a subclass of ddpm\.config\.ModelConfig"):
        from_json('{"model": {"net": "odd"}}')
