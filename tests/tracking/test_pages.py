"""What a run writes for MLflow's pages: params that have an effect, changes from the preset, and a description."""

import json
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import Run
from support import processes
from support.processes import REPO
from support.tiny import TINY_NET
from support.tracked import address_at, deliver, put_records, run_of

from ddpm import presets
from ddpm.build import TrainedNet, build_net
from ddpm.config import Config
from ddpm.config_io import flatten, override
from ddpm.diffusion import schedules
from ddpm.sampling import generate
from ddpm.storage.locations import Location
from ddpm.tracking import pages, run_params
from ddpm.tracking.metrics_buffer import DataSetInput, Metrics, Record, Tags
from ddpm.tracking.mlflow_client import tracking_uri
from ddpm.tracking.mlflow_runs import Address

SMALL = override(
    TINY_NET, {"model.zero_init": False, "schedule.num_timesteps": 20, "sample.num_sample_steps": 5}
)
OTHER: dict[str, Any] = {
    "sample.rho": 3.0,
    "sample.eta": 0.5,
    "sample.mean": "plain",
    "sample.variance": "beta",
}
DATA = DataSetInput("digits", "4f" * 16, "s3://bucket/digits", '{"images": 1500, "shape": [8, 8, 1]}')


@pytest.mark.parametrize("kind", schedules.SCHEDULES)
def test_params_include_exactly_the_fields_that_affect_the_schedule(kind: str) -> None:
    config = override(Config(), {"schedule.kind": kind, "schedule.num_timesteps": 100})
    beta, found = schedules.build(config.schedule).beta, run_params.params(config)
    for name, value in flatten(config.schedule).items():
        if isinstance(value, float):
            changed = override(config, {f"schedule.{name}": 0.9 * value}).schedule
            has_effect = not torch.equal(schedules.build(changed).beta, beta)
            assert (f"schedule.{name}" in found) == has_effect, name


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpmpp_2m", "heun"])
@pytest.mark.parametrize("spacing", ["auto", "uniform", "karras"])
def test_params_include_exactly_the_fields_that_affect_the_images(sampler: str, spacing: str) -> None:
    config = override(SMALL, {"sample.sampler": sampler, "sample.spacing": spacing})
    net, found = build_net(config).eval(), run_params.params(config)

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
        ({"objective.process": "consistency"}, "objective.predict", "objective.weight"),
        ({"cluster.num_workers": "1:4"}, "cluster.num_workers", "cluster.max_failures"),
    ],
)
def test_params_without_effect_are_left_out(change: dict[str, Any], has: str, lacks: str) -> None:
    found = run_params.params(override(presets.DIGITS, change))
    assert has in found and lacks not in found
    assert None not in found.values()


@pytest.mark.parametrize("name", presets.PRESETS)
def test_tags_name_the_nearest_preset_and_the_changes(name: str) -> None:
    changes = {"schedule.kind": "sigmoid", "optim.lr": 0.5, "run.name": "a", "data.shards": "s3://b/d"}
    assert run_params.nearest_preset(presets.PRESETS[name]) == (name, {})
    changed = override(presets.PRESETS[name], changes)
    assert run_params.nearest_preset(changed) == (name, {"schedule.kind": "sigmoid", "optim.lr": 0.5})
    found = run_params.tags(changed, "python jobs/train.py x")
    assert (found["preset"], found["changed"]) == (name, "schedule.kind=sigmoid, optim.lr=0.5")
    assert found["command"] == "python jobs/train.py x"
    assert found["version.torch"] == torch.__version__.partition("+")[0] or "+" in found["version.torch"]
    assert run_params.tags(presets.PRESETS[name], None).get("changed") == "nothing"


@pytest.fixture
def address() -> Address:
    return address_at(tracking_uri())


def first_records(config: Config) -> list[Record]:
    """The records that a run writes first."""
    checkpoint = Tags({"checkpoint": "s3://bucket/runs/a/checkpoint-000000000064"})
    return [Tags(run_params.tags(config, "python jobs/train.py digits --run.name a")), DATA, checkpoint]


def description(run: Run) -> str:
    return run.data.tags[pages.NOTE_TAG]


def test_a_run_writes_its_description(address: Address, buffer: Location) -> None:
    config = override(presets.DIGITS, {"schedule.kind": "linear"})
    bits = {"held_out/bits_per_dim": 4.25, "held_out_error/bits_per_dim": 0.5}
    put_records(buffer, 64, *first_records(config), Metrics(bits, 64, 1))
    deliver(address, buffer, 64, pages.STOPPED, **run_params.params(config))
    run = run_of(address)
    assert description(run).split("\n\n") == [
        "**digits**, schedule.kind=linear: predicts eps, linear schedule of 500 steps.",
        "Stopped at 64 of 144,000 images; bits/dim 4.2500 ± 0.5000.",
        "Resume: `python jobs/train.py digits --run.name a`",
        "Sample: `python jobs/sample.py s3://bucket/runs/a`",
        "*Written by the run; another text in its place stays.*",
    ]
    assert run.data.tags["checkpoint"].endswith("checkpoint-000000000064")
    if (REPO / ".git").exists():  # absent in an archive of the source
        head = processes.run(["git", "rev-parse", "HEAD"], cwd=REPO).stdout.strip()
        assert run.data.tags["git.commit"] == run.data.tags["mlflow.source.git.commit"] == head
        assert run.data.tags["git.dirty"] in ("True", "False")
    (found,) = run.inputs.dataset_inputs
    assert (found.dataset.name, found.dataset.digest, found.dataset.profile) == (
        "digits",
        DATA.digest,
        DATA.profile,
    )
    assert json.loads(found.dataset.source) == {"uri": DATA.uri}

    evaluated = {"eval/bits_per_dim": 4.0, "eval_error/bits_per_dim": 0.1, "eval/KID-pixels": 0.03}
    put_records(
        buffer, 128, *first_records(config), Metrics(evaluated, 128, 2)
    )  # a resumed run records it again
    deliver(address, buffer, 128, "FAILED", **{"train.total_images": 288_000})
    run = run_of(address)
    assert "Failed at 128 of 288,000 images; bits/dim 4.0000 ± 0.1000; KID-pixels 0.0300." in description(run)
    assert len(run.inputs.dataset_inputs) == 1


def test_a_user_s_own_description_is_kept(address: Address, buffer: Location) -> None:
    put_records(buffer, 64, *first_records(presets.DIGITS))
    deliver(address, buffer, 64)
    MlflowClient(address.uri).set_tag(run_of(address).info.run_id, pages.NOTE_TAG, "My best run.")
    put_records(buffer, 128, Metrics({"train/loss": 1.0}, 128, 1))
    deliver(address, buffer, 128)
    assert description(run_of(address)) == "My best run."


def test_a_run_of_another_program_gets_no_description(buffer: Location) -> None:
    address = Address(tracking_uri(), "foreign", "a", "5" * 32, source="train_classifier.py")
    put_records(buffer, 64, Metrics({"loss": 1.0}, 64, 1))
    deliver(address, buffer, 64)
    assert pages.NOTE_TAG not in run_of(address).data.tags
