"""Runs read back from folders and buckets, to be compared."""

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import evaluated
from support.compared import COMMAND, NEWEST, STEPS, grid, make_run, shown_text
from support.reported import made, near, result

from ddpm.config.presets import DIGITS
from ddpm.evaluation import save_results
from ddpm.evaluation.compared_run import ComparedRun, read
from ddpm.evaluation.comparison import results_alike
from ddpm.evaluation.plots import ChartPoint
from ddpm.runs import checkpoint, curves, run_folder
from ddpm.sampling import generate
from ddpm.utils import images
from ddpm.utils.errors import UserError


def content_of(run: ComparedRun) -> tuple[Any, ...]:
    """Everything about a run that does not depend on where it was read from."""
    digests = {at: hashlib.sha256(grid()).hexdigest() for at, grid in run.grids.items()}
    curves = dict(run.curves)
    return run.name, dict(run.settings), dict(run.facts), curves, digests


def test_a_copied_folder_is_all_that_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    uri, _ = make_run(str(tmp_path), "a")
    (first,) = read([uri, uri])
    assert first.curves["held_out/bits_per_dim"] == [
        ChartPoint(at, 5.0 - i, 0.25) for i, at in enumerate(STEPS)
    ]
    assert set(first.curves) == {"train/loss", "held_out/bits_per_dim"}
    assert first.settings["schedule.kind"] == "cosine" and list(first.grids) == list(STEPS)
    assert first.images_seen == NEWEST
    assert first.facts == {
        "status": "stopped",
        "images seen": f"4,480 of {DIGITS.train.total_images:,}",
        "minutes": "0.8",
        "images/s": "128",
        "weights": "627,433",
        "seed": "0",
        "hardware": "2 cores",
        "versions": "torch 2.13.0, commit 0123",
        "data": "digits (01234567)",
    }
    assert first.command == COMMAND
    content = content_of(first)
    shutil.copytree(uri, tmp_path / "copies/a")
    shutil.rmtree(uri)
    assert content_of(read([str(tmp_path / "copies/a")])[0]) == content


def test_a_run_in_a_bucket(s3_bucket: str, tmp_path: Path) -> None:
    there = make_run(f"{s3_bucket}/runs", "a")[0]
    here = make_run(str(tmp_path), "a")[0]
    (of_bucket,) = read([there])
    (of_folder,) = read([here])
    assert content_of(of_bucket) == content_of(of_folder)


def test_runs_that_differ_in_seeds_and_execution_alone_are_one_configuration(tmp_path: Path) -> None:
    execution = {"train.checkpoint_every_images": 640, "data.shards": "/elsewhere"}
    alike = ({}, {"train.seed": 1, "sample.seed": 2, **execution})
    others = ({"optim.lr": 0.5}, {"schedule.kind": "linear"}, {"train.total_images": 99})
    uris = [
        make_run(str(tmp_path), f"run-{i}", changes=changes)[0] for i, changes in enumerate((*alike, *others))
    ]
    first, second, *rest = [run.configuration for run in read(uris)]
    assert first == second != "" and len({first, *rest}) == 4


def test_a_run_without_a_checkpoint_has_no_settings(tmp_path: Path) -> None:
    new = run_folder.open_run("new", str(tmp_path), run_folder.Facts(command=COMMAND)).location
    new.child(f"samples/{1:012d}.png").write(images.png_bytes(grid(0)))
    (fresh,) = read([new.uri], sample=True)
    assert list(fresh.grids) == [1] and fresh.settings == {} and fresh.images_seen == 0
    assert "no checkpoint yet" in shown_text([fresh])


@pytest.mark.parametrize("damaged", ["curves", "status.json"])
def test_a_damaged_file_is_an_error_that_names_it(tmp_path: Path, damaged: str) -> None:
    uri, _ = make_run(str(tmp_path), "torn")
    file = Path(uri, damaged)
    if damaged == "curves":
        (file,) = Path(uri, curves.FOLDER).iterdir()
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"[")
    with pytest.raises(UserError, match=file.name):
        read([uri])


def test_a_run_without_grids_is_sampled_from_its_newest_checkpoint(tmp_path: Path) -> None:
    run = evaluated.make_run(tmp_path / "runs", evaluated.make_data(tmp_path / "data"))
    ((at, grid),) = read([run.location.uri], sample=True)[0].grids.items()
    assert at == evaluated.POSITIONS[-1]
    folder = Path(run_folder.checkpoints(run.location)[-1].path)
    one_batch = generate.draw(checkpoint.load_net(folder), range(64))
    difference = images.from_png(grid()).astype(int) - images.grid(one_batch.numpy())
    assert abs(difference).max() <= 1  # batches of another size are rounded otherwise
    assert read([run.location.uri])[0].grids == {}
    weights = bytearray((folder / "ema.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "ema.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match=r"ema\.safetensors is damaged"):
        read([run.location.uri], sample=True)


def test_evaluations_are_found_in_the_run_and_in_files(tmp_path: Path) -> None:
    uri, key = make_run(str(tmp_path), "a")
    of_image = tuple(i / 7 for i in range(90))
    report = made(
        result(3, near(0.03), run_key=key, checkpoint=f"{uri}/checkpoint-3", bits_of_image=of_image)
    )
    assert len(list(save_results.to_runs(report))) == 2
    file = tmp_path / "y.json"
    file.write_text(report.to_json())
    (both,) = read([uri], [str(file)])
    assert both.evaluations == [report, report]


def test_evaluations_that_cannot_be_read_are_left_out_in_a_line_each(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    uri, key = make_run(str(tmp_path), "a")
    report = made(result(3, run_key=key, checkpoint=f"{uri}/checkpoint-3"))
    folder = Path(uri, run_folder.EVALUATIONS)
    folder.mkdir()
    (folder / "new.json").write_text(report.to_json())
    other = '{"format": "ddpm-evaluation/1", "settings": {}, "checkpoints": [{"density": 1}]}'
    (folder / "old.json").write_text(other)
    (folder / "broken.json").write_text('{"checkpoints": [')
    (run,) = read([uri])
    assert run.evaluations == [report]
    broken, old = sorted(caplog.messages)
    assert "broken.json" in broken and "old.json" in old and "evaluate again" in old
    with pytest.raises(UserError, match=r"--evaluations .*old\.json .*ddpm-evaluation/1"):
        read([uri], [str(folder / "old.json")])


def test_a_built_in_net_beside_a_run(tmp_path: Path) -> None:
    uri, _ = make_run(str(tmp_path), "a")
    name = "builtin:digits"
    net, of_folder = read([name, uri], sample=True)
    assert (net.name, net.key, net.where, net.images_seen) == (name, name, name, 144_000)
    assert list(net.grids) == [144_000] and next(iter(net.grids.values()))().startswith(b"\x89PNG")
    assert net.settings["schedule.num_timesteps"] == "500" and of_folder.where == uri
    assert read([name])[0].grids == {}
    evaluated = replace(net, evaluations=[made(replace(result(144), run_key="", checkpoint=name))])
    assert list(results_alike([evaluated])[name]) == [144_000]
