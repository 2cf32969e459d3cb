"""The choices of the command lines are the keys of the tables."""

from typing import Any, get_args

import pytest

from ddpm import config as configs
from ddpm import config_io
from ddpm.data import catalog
from ddpm.diffusion import objectives, samplers, schedules
from ddpm.evaluation import nets


@pytest.mark.parametrize(
    ("names", "table"),
    [
        (configs.ScheduleKind, schedules.SCHEDULES),
        (configs.Process, objectives.PROCESSES),
        (configs.Prediction, objectives.PREDICTIONS),
        (configs.Timesteps, objectives.TIMESTEPS),
        (configs.SamplerName, samplers.SAMPLERS),
        (configs.FeatureNetName, nets.FEATURE_NETS),
    ],
)
def test_every_choice_can_be_built(names: Any, table: dict[str, Any]) -> None:
    assert sorted(get_args(names)) == sorted(table)


def test_every_process_has_a_sampler() -> None:
    assert {kind.process for kind in samplers.SAMPLERS.values()} == set(objectives.PROCESSES)


def test_nets_have_the_name_of_their_config() -> None:
    assert {name: kind().net for name, kind in configs.NETS.items()} == {name: name for name in configs.NETS}  # type: ignore[call-arg]


def test_fields_of_schedules_exist() -> None:
    known = config_io.flatten(configs.ScheduleConfig())
    assert {field for _, fields in schedules.SCHEDULES.values() for field in fields} <= set(known)


def test_sources_have_the_name_of_their_table_entry() -> None:
    """A manifest contains the name of its source."""
    assert {name: kind.__dataclass_fields__["name"].default for name, kind in catalog.SOURCES.items()} == {
        name: name for name in catalog.SOURCES
    }
