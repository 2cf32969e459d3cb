"""A config survives a round trip through JSON, and an invalid file is a one-line error with file and key."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm.build import resolve_sample
from ddpm.config.json import flatten, from_json, override, to_json
from ddpm.config.presets import PRESETS
from ddpm.config.tree import Config, ObjectiveConfig, UNetConfig
from ddpm.utils.errors import UserError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_json(name: str) -> None:
    config = PRESETS[name]
    again = from_json(to_json(config))
    assert again == config
    assert hash(again) == hash(config)  # lists came back as tuples


@pytest.mark.parametrize("name", PRESETS)
def test_a_flat_preset_builds_it_again(name: str) -> None:
    assert override(Config(), flatten(PRESETS[name])) == PRESETS[name]


def test_an_older_file_still_loads() -> None:
    """It lacks later keys, and has no choice of nets."""
    sample = {"sampler": "ddim", "num_sample_steps": 50, "mean": "clipped", "clip_x_0": False}
    config = from_json(json.dumps({"sample": sample, "model": {"image_size": 8, "base_width": 16}}))
    assert flatten(config.sample) | sample == flatten(config.sample)
    assert config.model == UNetConfig(image_size=8, base_width=16)


def test_flat_keys_are_dotted_and_in_the_order_of_the_tree() -> None:
    flat = flatten(Config())
    assert flat["model.base_width"] == 128
    assert next(iter(flat)) == "data.shards"
    assert list(flat)[-1] == "run.experiment"
    assert not any(isinstance(value, dict) for value in flat.values())


def test_override_changes_only_the_given_keys() -> None:
    before = PRESETS["digits"]
    after = override(before, {"optim.lr": 1, "model.width_multipliers": [1, 3], "data.shards": None})
    assert after.model.width_multipliers == (1, 3)
    assert (after.optim.lr, type(after.optim.lr)) == (1.0, float)
    changed = {key for key, value in flatten(after).items() if value != flatten(before)[key]}
    assert changed == {"optim.lr", "model.width_multipliers"}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.seed", True),
        ("train.seed", None),
        ("optim.lr", "0.1"),
        ("optim.lr", float("nan")),
        ("optim.lr", 10**400),
        ("train.compile", 1),
        ("run.storage", None),
        ("schedule.kind", "lineer"),
        ("model.width_multipliers", 2),
        ("model.width_multipliers", [1, True]),
        ("sample.guidance_interval", [0.3, 1.0, 3.0]),
        ("sample.guidance_interval", [0.3, "3"]),
        ("optim.lr.deeper", 1.0),
        ("optim", 1),
    ],
)
def test_a_value_of_the_wrong_type_is_an_error_with_its_key(key: str, value: Any) -> None:
    *_, last = key.removesuffix(".deeper").split(".")
    with pytest.raises(UserError, match=rf"^config: .*{last}") as caught:
        override(Config(), {key: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optim.lr", 1),
        ("model.attention_resolutions", []),
        ("model.attention_head_dim", None),
        ("sample.guidance_interval", [0.3, 3]),
        ("sample.guidance_interval", None),
        ("cluster.gpu", False),
    ],
)
def test_a_valid_value_is_accepted(key: str, value: Any) -> None:
    taken = flatten(override(Config(), {key: value}))[key]
    assert taken == (tuple(value) if isinstance(value, list) else value)


@pytest.mark.parametrize(("key", "unknown"), [("lr", "lr"), ("optim.learning_rate", "learning_rate")])
def test_an_unknown_key_is_an_error_that_lists_the_known_keys(key: str, unknown: str) -> None:
    with pytest.raises(UserError, match=rf"unknown key '{unknown}'; known are .*(lr_warmup|optim)"):
        override(Config(), {key: 1})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "^run/config.json: it is not JSON"),
        ("[" * 100_000, "^run/config.json: it is not JSON"),
        ('{"optim": ' * 100_000, "^run/config.json: it is not JSON"),
        ("[]", r"^run/config.json: it is \[\]; it must be an object"),
        ('{"optim": []}', r"^run/config.json: optim is \[\]; it must be an object"),
        ('{"optim": {"lr": "a"}}', "^run/config.json: optim.lr is 'a'; it must be a valid number"),
        ('{"optim": {"lr": 1e999}}', "^run/config.json: optim.lr is inf; it must be a finite number"),
        ('{"optim": {"rl": 1}}', "^run/config.json: optim: unknown key 'rl'"),
        ('{"schedule": {"kind": "x"}}', "^run/config.json: schedule.kind is 'x'; it must be one of linear, "),
    ],
)
def test_an_invalid_file_is_a_one_line_error_with_its_name(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        from_json(text, where="run/config.json")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_deeply_nested_value_is_rejected_near_the_recursion_limit() -> None:
    for depth in range(700, 1100):
        with pytest.raises(UserError):
            from_json('{"train": {"seed": ' + "[" * depth + "]" * depth + "}}")


@settings(deadline=None, max_examples=300)
@given(st.dictionaries(st.sampled_from(sorted(flatten(Config()))), JSON, min_size=1, max_size=3))
def test_any_value_of_a_known_key_is_valid_or_a_user_error(values: dict[str, Any]) -> None:
    nested: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        group, name = key.split(".")
        nested.setdefault(group, {})[name] = value
    try:
        config = from_json(json.dumps(nested))
    except UserError as error:
        assert str(error).startswith("config.json")
    else:
        assert from_json(to_json(config)) == config


@pytest.mark.parametrize(
    ("sampler", "process", "resolved"),
    [
        ("auto", "gaussian", "ddim"),
        ("auto", "uniform_mix", "mix"),
        ("ddpm", "gaussian", "ddpm"),
        ("mix", "uniform_mix", "mix"),
        ("mix", "gaussian", None),
        ("ddim", "uniform_mix", None),
    ],
)
def test_a_sampler_fits_the_process(sampler: str, process: str, resolved: str | None) -> None:
    sample = override(Config(), {"sample.sampler": sampler}).sample
    objective = ObjectiveConfig(process=process)
    if resolved:
        assert resolve_sample(sample, objective).sampler == resolved
    else:
        with pytest.raises(UserError, match=f"sampler {sampler} cannot undo the process {process}"):
            resolve_sample(sample, objective)
