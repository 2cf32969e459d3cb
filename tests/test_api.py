"""`import ddpm`: light until it is used, and then the images and the errors of the command line."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import evaluated, processes

import ddpm
from ddpm.cli import sample
from ddpm.cluster.ray_init import NoCluster
from ddpm.config.json import override
from ddpm.config.presets import PRESETS
from ddpm.runs.storage import HOME
from ddpm.utils import command_line
from ddpm.utils.errors import UserError


def test_the_import_is_light() -> None:
    code = (
        "import sys, ddpm; print({'torch', 'ray', 'numpy', 'mlflow'} & {*sys.modules}, hasattr(ddpm, 'none'))"
    )
    done = processes.run([sys.executable, "-c", code], cwd=processes.REPO)
    assert (done.returncode, done.stdout) == (0, "set() False\n"), done.stderr


def test_images_are_those_of_the_command_line(
    digits_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = override(evaluated.CONFIG, {"model.num_classes": 10})
    run = ddpm.Run(evaluated.make_run(tmp_path, digits_uri, config).location.uri)
    pixels = run.sample(40, seed=3, label=7, sampler="dpmpp_2m", num_sample_steps=3)
    words = "--num-images 40 --seed 3 --label 7 --sampler dpmpp_2m --num-sample-steps 3 --out drawn"
    monkeypatch.setattr(sys, "argv", ["sample.py", run.uri, *words.split()])
    sample.main()
    theirs = [np.asarray(Image.open(f"drawn/images/{i:06d}.png")) for i in range(40)]
    assert pixels.shape == (40, 8, 8, 1) and (pixels[..., 0] == np.stack(theirs)).all()
    assert run.show(9).size == (3 * 50 + 2, 3 * 50 + 2)


def test_mistakes_are_refused(digits_uri: str, tmp_path: Path) -> None:
    run = ddpm.Run(evaluated.make_run(tmp_path, digits_uri, evaluated.CONFIG).location.uri)
    with pytest.raises(UserError, match=r"^num_images is 0"):
        run.sample(0)
    with pytest.raises(UserError, match=r"^eta has no effect here"):
        run.sample(sampler="heun", eta=0.5)
    with pytest.raises(UserError, match=r"^config: sample\.variance is 'measured'"):
        run.sample(sampler="ddpm", variance="measured")
    with pytest.raises(UserError, match=r"^config: optim\.lr is -1\.0"):
        ddpm.train("digits", lr=np.float32(-1))
    with pytest.raises(UserError, match=r"^no data set at /nothing/here"):
        ddpm.train("digits", data=Path("/nothing/here"))
    with pytest.raises(UserError, match=r"^there is no preset digit"):
        ddpm.train("digit")
    with pytest.raises(UserError, match=r"^config: model: unknown key 'widths'"):
        ddpm.train("digits", lr=1e-3, model={"widths": 1})


def test_an_error_of_a_call_names_it_and_a_later_one_does_not() -> None:
    with pytest.raises(UserError, match=r"ddpm\.train\('cifar10'\)"):
        ddpm.train("cifar10")
    assert "ddpm.train" not in command_line.typed()


def test_a_run_of_a_config_is_named_by_its_nearest_preset(
    digits_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two configs are two runs."""
    # Nobody listens there, and with a home no job looks for its cluster first: the call ends once the run has its name.
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setenv(HOME, str(tmp_path))
    names = []
    for lr in (1e-3, 2e-3, 1e-3):
        with pytest.raises(NoCluster):
            ddpm.train(override(PRESETS["digits"], {"optim.lr": lr, "data.shards": digits_uri}))
        (name,) = re.findall(r"^run .*/(digits-\w{8})$", capsys.readouterr().out, re.MULTILINE)
        names.append(name)
    assert names[0] == names[2] != names[1]
