"""Results of a search: ranks and ties, flags, the best config and plots, from made-up trials."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from mlflow import MlflowClient
from support import searches, tracked
from torch import Tensor

from ddpm.config.json import from_json, override
from ddpm.config.presets import DIGITS
from ddpm.config.tree import Config
from ddpm.diffusion import process, samplers, schedules
from ddpm.diffusion.objectives import Denoised
from ddpm.evaluation.rung import RANKING, REPORTING, Evaluation
from ddpm.runs import storage
from ddpm.runs.evaluations import Score
from ddpm.runs.run_folder import RunStatus
from ddpm.runs.storage import Location
from ddpm.search import leaderboard, plots, publish, results, space
from ddpm.search.trials import Trial, Trials
from ddpm.tracking.mlflow_client import tracking_uri

COSINE = {"schedule.kind": "cosine", "optim.lr": 1e-3}
LINEAR = {
    "schedule.kind": "linear",
    "schedule.beta_end": 0.005,
    "schedule.num_timesteps": 200,
    "optim.lr": 3e-3,
}
CONFIG = override(DIGITS, {"train.total_images": 128, "run.experiment": "searches"})
SPACE = space.parse(
    (
        "schedule.kind=cosine|linear",
        "schedule.beta_end=log(0.001,0.1)",
        "schedule.num_timesteps=int(100,1000)",
        "optim.lr=log(1e-4,1e2)",
    ),
    CONFIG,
)
SETTINGS = {"config": {}, "space": SPACE.as_json(), "rungs": [64, 128]}


@pytest.fixture
def place(tmp_path: Path) -> Location:
    return storage.resolve(str(tmp_path / "search"))


def make_trials(
    place: Location,
    wanted: list[tuple[dict[str, Any], RunStatus, dict[int, float]]],
    config: Config = CONFIG,
) -> Trials:
    """Write the trials of a search; each is its changes, its status, and images seen -> mean bits/dim.

    This is the mean on the images that rank; on the others it is 0.125 more.
    """
    trials = searches.begin(place, SETTINGS, config)
    for trial in wanted:
        add_trial(trials, *trial)
    return trials


def add_trial(
    trials: Trials,
    changes: dict[str, Any],
    status: RunStatus,
    found: dict[int, float],
    repeats: str | None = None,
) -> None:
    image = np.random.default_rng(0).normal(0, 0.5, 50)
    image[RANKING] -= image[RANKING].mean()
    image[REPORTING] -= image[REPORTING].mean() - 0.125
    name = f"digits-{len(trials.all())}"
    trials.begin(name, changes, repeats)
    for at, mean in found.items():
        evaluation = Evaluation(at, tuple((mean + image).tolist()), 0.5, 0.9 - mean / 10)
        searches.measure(trials, name, evaluation)
    trials.end(name, status, "it broke" if status == RunStatus.FAILED else "", wall_s=10.0)


@pytest.fixture
def without_finalists(place: Location) -> Trials:
    return make_trials(
        place,
        [
            (COSINE, RunStatus.FINISHED, {64: 3.0, 128: 2.5}),
            (LINEAR, RunStatus.FINISHED, {64: 2.9, 128: 2.25}),
            ({**COSINE, "optim.lr": 1e-2}, RunStatus.PRUNED, {64: 4.0}),
            ({**COSINE, "optim.lr": 1e2}, RunStatus.FAILED, {}),
            ({**COSINE, "optim.lr": 2e-3}, RunStatus.FINISHED, {64: 3.0, 128: 2.5}),
        ],
    )


@pytest.fixture
def trials(without_finalists: Trials) -> Trials:
    for number, kid in ((0, 0.02), (1, 0.05), (4, 0.021)):
        without_finalists.score(f"digits-{number}", Score("KID-pixels", kid, 0.001, 100))
    return without_finalists


def test_ranks_ties_and_flags(trials: Trials) -> None:
    found = leaderboard.ranked(trials)
    assert [s.trial.number for s in found] == [1, 0, 4, 2, 3]
    # trials 0 and 4 have equal bits/dim, and overlapping KID
    assert [str(s.by_bits) for s in found] == ["1", "2-3", "2-3", "None", "None"]
    assert [str(s.by_kid) for s in found] == ["3", "1-2", "1-2", "None", "None"]
    assert [s.is_flagged for s in found] == [True, False, False, False, False]
    assert found[0].leftover == pytest.approx(8 * 0.775, abs=0.1)  # 8x8 exp(-200 (1e-4 + 5e-3) / 4)
    chosen, *_ = results.remarks(found)
    assert all(word in chosen for word in ("digits-1", "lowest bits/dim", "3 trials", "KID"))
    lines = "\n".join(results.remarks(found))
    assert "sqrt(D alpha_bar_T), with D numbers per image, is above 0.5" in lines
    assert "The best by bits/dim: digits-1.\n" in lines
    assert lines.endswith("The best by KID: digits-0, digits-4, which are tied.")
    assert "digits-1, has 2.3750 ± 0." in lines and "--finalist-seeds 3 ranks configurations" in lines
    assert f"of the digits {results.FEWER_TIMESTEPS}" in lines


def test_the_configuration_whose_trainings_are_best_wins(trials: Trials) -> None:
    """Trials 1 and 0 have the best nets; that of 1 was lucky. The reported number is of the other trainings."""
    for repeats, changes, *found in ((1, LINEAR, 2.65, 2.75), (0, COSINE, 2.52, 2.48)):
        for seed, bits in enumerate(found, 1):
            again = {**changes, "train.seed": seed}
            add_trial(trials, again, RunStatus.FINISHED, {64: 3.0, 128: bits}, f"digits-{repeats}")
    rows = leaderboard.ranked(trials)
    assert [row.trial.number for row in rows] == [0, 1, 4, 8, 7, 5, 6, 2, 3]
    assert [str(row.by_trainings) for row in rows[:3]] == ["1-2", "1-2", "None"]
    assert [str(row.by_bits) for row in rows[:4]] == ["2-3", "1", "2-3", "None"]
    best, lucky = rows[:2]
    assert best.mean and best.reported and lucky.reported and best.mean.error > 0.02 / 3**0.5
    assert (best.mean.value, best.reported.value, lucky.reported.value) == pytest.approx((2.5, 2.625, 2.825))
    lines = "\n".join(results.remarks(rows))
    assert all(word in lines.splitlines()[0] for word in ("digits-0", "mean", "2 finalists"))
    assert "grey levels" not in lines
    assert "digits-0, has 2.6250 ± " in lines and "trained again after the search" in lines
    assert f"trainings of one is {(0.02**2 / 2 + np.var([2.25, 2.65, 2.75], ddof=1) / 2) ** 0.5:.4f}" in lines
    text = results.markdown(rows, [])
    assert "| finished, digits-0 again |" in text and "| mean of trainings | rank |" in text
    assert json.loads(str(results.best_config(rows, CONFIG)))["train"]["seed"] == 0
    table = pq.read_table(io.BytesIO(results.parquet(rows))).to_pylist()
    assert table[0]["reported_bits_per_dim"] == best.reported.value and table[3]["repeats"] == "digits-0"
    assert table[1]["reported_bits_per_dim"] is None and table[1]["rank_by_trainings"] == "1-2"
    assert plots.parallel(trials.all(), SPACE.domains).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("image_size", "channels", "leftover", "is_flagged"),
    [(8, 1, 0.05, False), (32, 3, 0.35, False), (64, 3, 0.70, True), (256, 3, 2.82, True)],
)
def test_the_schedule_of_ho_et_al_is_flagged_for_large_images(
    place: Location, image_size: int, channels: int, leftover: float, is_flagged: bool
) -> None:
    changes = {"model.image_size": image_size, "model.channels": channels, "schedule.kind": "linear"}
    config = override(CONFIG, {**changes, "schedule.num_timesteps": 1000})
    trials = make_trials(place, [({"schedule.beta_end": 0.02}, RunStatus.FAILED, {})], config)
    (found,) = leaderboard.ranked(trials)
    assert found.leftover == pytest.approx(leftover, abs=0.005) and found.is_flagged == is_flagged


def test_the_leftover_signal_biases_samples() -> None:
    """Flat 64x64 colour images of N(0.6, 0.1^2), drawn from pure noise: 0.6 * 0.1 * leftover too small."""
    linear = schedules.linear(1000, 1e-4, 0.02)
    num_dims = 3 * 64**2

    def denoise(x_t: Tensor, t: Tensor) -> Denoised:
        a = linear.alpha_bar[t].view(-1, 1, 1, 1)
        gain = a.sqrt() * 0.1**2 / (a * 0.1**2 + (1 - a) / num_dims)
        x_0_hat = 0.6 + gain * (x_t.mean() - a.sqrt() * 0.6) + 0 * x_t
        return Denoised(x_0_hat, process.predict_eps_from_x_0(linear.alpha_bar, x_t, t, x_0_hat))

    def no_noise() -> Tensor:
        return torch.zeros(1, 3, 64, 64, dtype=torch.float64)

    x = samplers.ddim(denoise, linear, no_noise, timesteps=range(999, -1, -1), threshold=None)
    leftover = (num_dims * linear.alpha_bar[-1]).sqrt().item()
    assert 0.6 - x.mean().item() == pytest.approx(0.06 * leftover, rel=0.03)


def test_all_forms_of_the_leaderboard_agree(trials: Trials, tmp_path: Path) -> None:
    found = leaderboard.ranked(trials)
    (tmp_path / "results.parquet").write_bytes(results.parquet(found))
    rows = pq.read_table(tmp_path / "results.parquet").to_pylist()
    assert [row["trial"] for row in rows] == ["digits-1", "digits-0", "digits-4", "digits-2", "digits-3"]
    first, *_, last = rows
    assert (first["schedule.beta_end"], first["rank_by_bits"], first["kid"]) == (0.005, "1", 0.05)
    assert first["bits_per_dim"] == pytest.approx(2.25) and rows[1]["schedule.beta_end"] is None
    assert (last["status"], last["reason"], last["bits_per_dim"]) == ("failed", "it broke", None)
    text = results.markdown(found, ["a remark"])
    assert "| digits-1 ! | finished | 128 | linear |" in text and "failed: it broke" in text
    assert text.endswith("- a remark\n")
    assert len(results.table(found).rows) == 5


def test_the_best_config_can_be_trained(trials: Trials) -> None:
    text = results.best_config(leaderboard.ranked(trials), CONFIG)
    assert text is not None
    found = from_json(text, "best.json", DIGITS)
    assert (found.schedule.kind, found.schedule.beta_end, found.optim.lr) == ("linear", 0.005, 3e-3)
    assert found.train.total_images == 128
    assert (found.run, found.cluster, found.data.shards) == (DIGITS.run, DIGITS.cluster, None)
    assert found.train.keep_checkpoints == DIGITS.train.keep_checkpoints
    assert not set(json.loads(text)) & {"run", "cluster"} and "images" not in json.loads(text)["data"]


def test_kid_of_another_feature_net_is_not_ranked(trials: Trials) -> None:
    trials.score("digits-4", Score("KID-lite0", 0.001, 0.0001, 100))
    found = leaderboard.ranked(trials)
    assert [str(s.by_kid) for s in found] == ["2", "1", "None", "None", "None"]
    assert "KID-pixels" in results.table(found).names
    assert [line[-2:] for line in results.table(found).rows[2:3]] == [["", ""]]


def test_a_finalist_of_few_timesteps_takes_as_many_steps(place: Location) -> None:
    trials = make_trials(
        place,
        [
            ({**COSINE, "schedule.num_timesteps": 12}, RunStatus.FINISHED, {128: 2.5}),
            (LINEAR, RunStatus.FINISHED, {128: 2.25}),
        ],
    )
    assert [leaderboard.num_sample_steps(trials, trial) for trial in trials.all()] == [12, leaderboard.STEPS]


def test_a_search_without_finished_trials(place: Location) -> None:
    found = leaderboard.ranked(
        make_trials(place, [(COSINE, RunStatus.FAILED, {}), (LINEAR, RunStatus.FAILED, {})])
    )
    assert [s.by_bits for s in found] == [None, None]
    assert not any("chosen" in line for line in results.remarks(found))
    assert results.best_config(found, CONFIG) is None
    assert results.parquet(found) and len(results.table(found).rows) == 2


def test_plots(trials: Trials) -> None:
    shown = trials.all()
    one = Trial("digits", 0, {}, status=RunStatus.FINISHED, rungs=shown[0].rungs)
    rendered = [
        plots.parallel(shown, SPACE.domains),
        plots.parallel([one], {}),
        plots.scatter(shown),
    ]
    assert all(png.startswith(b"\x89PNG") for png in rendered)


def test_the_results_are_files_in_the_folder(place: Location, without_finalists: Trials) -> None:
    lines = list(publish.write(without_finalists, leaderboard.ranked(without_finalists)))
    assert [line.split()[0] for line in lines] == ["results", "best"]
    assert {path.name for path in Path(place.path).iterdir() if path.is_file()} == {
        "search.json",
        "results.md",
        "results.parquet",
        "best.json",
        "parallel.png",
    }


def test_the_search_s_own_run_in_mlflow_has_all_results(place: Location, without_finalists: Trials) -> None:
    lines = list(publish.sync(place, 60))
    assert "MLflow" in lines[-1]
    run = tracked.run_with_key(tracking_uri(), without_finalists.file.search_key)
    client = MlflowClient(tracking_uri())
    names = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert names == {"results.md", "results.parquet", "best.json", "parallel.png"}
    assert run.data.metrics["best/bits_per_dim"] == pytest.approx(2.375)
    assert run.data.tags["mlflow.source.name"] == "ddpm search"
    assert run.data.tags["mlflow.note.content"] == Path(place.path, "results.md").read_text()
    assert (run.data.params["search.rungs"], run.data.params["train.total_images"]) == ("[64, 128]", "128")
    assert "low" in run.data.params["space.optim.lr"]
    assert run.info.status == "FINISHED"
