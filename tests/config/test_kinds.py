"""The tables of kinds: each line can be built, and the settings that it reads are the ones that have an effect."""

import dataclasses
import inspect
from typing import Any

import pytest

from ddpm.build import build_objective, build_sampler
from ddpm.config import kinds
from ddpm.config.json import flatten, from_json, override
from ddpm.config.tree import Config
from ddpm.tracking import run_params
from ddpm.utils.errors import UserError

FLAT = flatten(Config())


def kinds_of(*fields: str) -> list[tuple[str, str]]:
    return [(field, name) for field in fields for name in kinds.TABLES[field]]


@pytest.mark.parametrize(("field", "name"), kinds_of(*kinds.TABLES))
def test_the_target_and_the_settings_of_a_kind_exist(field: str, name: str) -> None:
    kind = kinds.find(field, name)
    assert set(kind.reads) <= FLAT.keys()
    if kind.target:
        assert callable(kind.load())


@pytest.mark.parametrize(
    ("field", "name"),
    kinds_of(
        "objective.predict", "objective.weight", "objective.timesteps", "schedule.kind", "sample.spacing"
    ),
)
def test_every_choice_can_be_built(field: str, name: str) -> None:
    config = override(Config(), {field: name, "schedule.num_timesteps": 50, "sample.num_sample_steps": 5})
    objective: Any = build_objective(config)
    assert objective.weight.isfinite().all()
    build_sampler(config)


@pytest.mark.parametrize("name", kinds.SAMPLERS)
def test_every_sampler_can_be_built(name: str) -> None:
    build_sampler(
        override(Config(), {"sample.sampler": name, "objective.process": kinds.sampler(name).process})
    )


@pytest.mark.parametrize(("field", "name"), kinds_of("schedule.kind", "sample.sampler"))
def test_a_function_has_the_settings_that_it_reads_as_parameters(field: str, name: str) -> None:
    kind = kinds.find(field, name)
    given = {"spacing": "timesteps", "mean": "threshold", "clip_x_0": "threshold"}
    read = {given.get(key.partition(".")[2], key.partition(".")[2]) for key in kind.reads}
    own = {"num_timesteps", "num_sample_steps", "denoise", "noise", "schedule", "on_step"}
    assert set(inspect.signature(kind.load()).parameters) - own == read


@pytest.mark.parametrize("name", kinds.OBJECTIVES)
def test_every_process_has_a_sampler(name: str) -> None:
    process = kinds.objective(name).process
    assert kinds.sampler(kinds.default_sampler(process)).process == process


def test_nets_and_sources_have_the_names_of_their_kinds() -> None:
    """A manifest contains the name of its source."""
    assert {name: kind.load()().net for name, kind in kinds.NETS.items()} == {
        name: name for name in kinds.NETS
    }
    for name, kind in kinds.SOURCES.items():
        (field,) = [field for field in dataclasses.fields(kind.load()) if field.name == "name"]
        assert field.default == name


GAUSSIAN = """objective.label_dropout objective.log_sigma_mean objective.log_sigma_std objective.min_snr_gamma
objective.sigma_data sample.guidance_interval sample.guidance_scale""".split()
OF_SCHEDULES = """schedule.beta_start schedule.beta_end schedule.cosine_s schedule.max_beta schedule.sigmoid_start
schedule.sigmoid_end schedule.sigmoid_tau schedule.sigma_min schedule.sigma_max""".split()
OF_DDIM = {"sample.mean", "sample.variance", "sample.rho", "sample.sigma_min"}


@pytest.mark.parametrize(
    ("changes", "without"),
    [
        ({}, {*GAUSSIAN, *OF_SCHEDULES[2:], *OF_DDIM}),
        (
            {"objective.weight": "edm", "objective.timesteps": "log_normal", "schedule.kind": "cosine"},
            {*GAUSSIAN, *OF_SCHEDULES, *OF_DDIM}
            - {"objective.sigma_data", "objective.log_sigma_mean", "objective.log_sigma_std"}
            - {"schedule.cosine_s", "schedule.max_beta"},
        ),
        (
            {"sample.sampler": "ddpm", "sample.spacing": "karras"},
            {*GAUSSIAN, *OF_SCHEDULES[2:], "sample.eta", "sample.clip_x_0"},
        ),
        (
            {"sample.sampler": "heun", "model.num_classes": 10},
            {*GAUSSIAN[1:5], "sample.guidance_interval", *OF_SCHEDULES[2:]}
            | {"sample.eta", "sample.mean", "sample.variance"},
        ),
        (
            {"objective.process": "uniform_mix", "objective.weight": "edm", "sample.spacing": "karras"},
            {*GAUSSIAN, *OF_SCHEDULES, *OF_DDIM, "schedule.kind", "schedule.num_timesteps", "sample.eta"}
            | {"objective.predict", "objective.weight", "objective.variance", "objective.timesteps"}
            | {"sample.spacing"},
        ),
    ],
    ids=["default", "edm", "ddpm", "heun", "uniform_mix"],
)
def test_the_settings_without_an_effect(changes: dict[str, Any], without: set[str]) -> None:
    config = override(Config(), changes)
    conditional = {key for key in FLAT if key.startswith(("schedule.", "objective.", "sample."))}
    conditional -= {"sample.num_images"}
    found = run_params.params(config)
    absent = {key for key in conditional if key not in found}
    nothing = {key for key in conditional if flatten(config)[key] is None}
    assert absent - nothing == without - nothing


def test_a_kind_that_has_moved_is_one_line_with_its_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kinds.EXAMPLES, "objective.process", {"swirl": "examples/swirl"})
    with pytest.raises(UserError, match=r"objective\.process is 'swirl'; .* examples/swirl"):
        from_json('{"objective": {"process": "swirl"}}')
