"""What a run writes for MLflow's pages: params that have an effect, changes from the preset, and a description."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support import processes, tracked
from support.processes import REPO
from support.tiny import TINY_NET

from ddpm.build import TrainedNet, build_net, build_schedule
from ddpm.config import presets
from ddpm.config.json import flatten, override
from ddpm.config.kinds import SCHEDULES
from ddpm.config.tree import Config
from ddpm.runs.curves import CurveRow
from ddpm.runs.run_folder import RunFolder, RunStatus
from ddpm.sampling import generate
from ddpm.tracking import mlflow_pages, run_params
from ddpm.tracking.mlflow_client import tracking_uri
from ddpm.tracking.push import push

SMALL = override(
    TINY_NET, {"model.zero_init": False, "schedule.num_timesteps": 20, "sample.num_sample_steps": 5}
)
OTHER: dict[str, Any] = {
    "sample.rho": 3.0,
    "sample.eta": 0.5,
    "sample.mean": "plain",
    "sample.variance": "beta",
}


@pytest.mark.parametrize("kind", SCHEDULES)
def test_params_include_exactly_the_fields_that_affect_the_schedule(kind: str) -> None:
    config = override(Config(), {"schedule.kind": kind, "schedule.num_timesteps": 100})
    beta = build_schedule(config.schedule).beta
    found = run_params.params(config)
    for name, value in flatten(config.schedule).items():
        if isinstance(value, float):
            changed = override(config, {f"schedule.{name}": 0.9 * value}).schedule
            has_effect = not torch.equal(build_schedule(changed).beta, beta)
            assert (f"schedule.{name}" in found) == has_effect, name


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpmpp_2m", "heun"])
@pytest.mark.parametrize("spacing", ["auto", "uniform", "karras"])
def test_params_include_exactly_the_fields_that_affect_the_images(sampler: str, spacing: str) -> None:
    config = override(SMALL, {"sample.sampler": sampler, "sample.spacing": spacing})
    net = build_net(config).eval()
    found = run_params.params(config)

    def sampled(config: Config) -> torch.Tensor:
        return generate.draw(TrainedNet(net, config), range(4))

    for name, value in (OTHER | {"sample.clip_x_0": False}).items():
        has_effect = not torch.equal(sampled(override(config, {name: value})), sampled(config))
        assert (name in found) == has_effect, name


@pytest.mark.parametrize(
    ("change", "has", "lacks"),
    [
        ({}, "optim.lr", "objective.min_snr_gamma"),
        ({"objective.weight": "min_snr"}, "objective.min_snr_gamma", "objective.label_dropout"),
        ({"objective.log_sigma_mean": 0.0}, "objective.timesteps", "objective.log_sigma_mean"),
        ({"objective.predict": "edm"}, "objective.sigma_data", "objective.min_snr_gamma"),
        ({"model.num_classes": 10}, "objective.label_dropout", "train.init_from"),
        ({"objective.process": "uniform_mix"}, "objective.process", "schedule.kind"),
        ({"cluster.num_workers": "1:4"}, "cluster.num_workers", "cluster.max_failures"),
    ],
)
def test_params_without_effect_are_left_out(change: dict[str, Any], has: str, lacks: str) -> None:
    found = run_params.params(override(presets.DIGITS, change))
    assert has in found and lacks not in found
    assert None not in found.values()


@pytest.mark.parametrize("name", presets.PRESETS)
def test_the_nearest_preset_and_the_changes(name: str) -> None:
    changes = {"schedule.kind": "sigmoid", "optim.lr": 0.5, "run.name": "a", "data.shards": "s3://b/d"}
    assert run_params.nearest_preset(presets.PRESETS[name]) == (name, {})
    changed = override(presets.PRESETS[name], changes)
    assert run_params.nearest_preset(changed) == (name, {"schedule.kind": "sigmoid", "optim.lr": 0.5})


@pytest.mark.parametrize(
    ("changed", "text"),
    [({}, "nothing"), ({"schedule.kind": "sigmoid", "optim.lr": 0.5}, "schedule.kind=sigmoid, optim.lr=0.5")],
)
def test_changes_as_text(changed: dict[str, Any], text: str) -> None:
    assert run_params.changed_text(changed) == text


def test_versions_name_packages_and_the_commit() -> None:
    found = run_params.versions()
    assert found["version.torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    if (REPO / ".git").exists():  # absent in an archive of the source
        head = processes.run(["git", "rev-parse", "HEAD"], cwd=REPO).stdout.strip()
        assert found["git.commit"] == found["mlflow.source.git.commit"] == head
        assert found["git.dirty"] in ("True", "False")


def test_a_run_has_a_description(database: Path, tmp_path: Path) -> None:
    config = override(
        tracked.CONFIG, {"schedule.kind": "linear", "objective.predict": "eps", "schedule.num_timesteps": 500}
    )
    run = tracked.begin(tmp_path, config=config)
    tracked.train(run, 64, config=config)
    bits = {"held_out/bits_per_dim": 4.25, "held_out_error/bits_per_dim": 0.5}
    tracked.append(run, [CurveRow(name, 64, value, 1) for name, value in bits.items()])
    tracked.set_status(run, RunStatus.STOPPED, 64)
    run_id = push(run).run_id
    assert description(run).split("\n\n") == [
        "**digits**, optim.lr=0.5: predicts eps, linear schedule of 500 steps.",
        "Stopped at 64 of 128 images; bits/dim 4.2500 ± 0.5000.",
        f"![samples](get-artifact?path={mlflow_pages.GRID}&run_uuid={run_id})",
        f"Resume: `{tracked.COMMAND}`",
        f"Sample: `ddpm sample {run.location.uri}`",
        "*Written by the run; another text in its place stays.*",
    ]

    tracked.train(run, 128, config=override(config, {"train.total_images": 288_000}))
    tracked.evaluate(run)
    tracked.set_status(run, RunStatus.FAILED, 128)
    push(run)
    assert (
        "Failed at 128 of 288,000 images; bits/dim 4.0000 ± 0.1000; KID-pixels 0.0300 ± 0.0020."
        in description(run)
    )


def description(run: RunFolder) -> str:
    return tracked.run_with_key(tracking_uri(), run.key).data.tags[mlflow_pages.NOTE_TAG]
