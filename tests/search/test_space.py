"""The search space: forms of a domain, keys that belong to a schedule kind, and one-line error messages."""

import re
from typing import Any

import optuna
import pytest
from support.processes import REPO

from ddpm.config.json import override
from ddpm.config.kinds import SCHEDULES
from ddpm.config.presets import DIGITS, PRESETS
from ddpm.diffusion import schedules
from ddpm.search import space
from ddpm.search.space import DEFAULT
from ddpm.training import loop
from ddpm.utils.errors import UserError


def test_a_grid_has_every_combination_without_keys_of_other_kinds() -> None:
    flags = ["schedule.kind=linear|cosine", "schedule.beta_end=0.01|0.02|0.04", "optim.lr=1e-4|1e-3|1e-2"]
    found = space.parse(flags, DIGITS).grid(100)
    linear = [point for point in found if point["schedule.kind"] == "linear"]
    cosine = [point for point in found if point["schedule.kind"] == "cosine"]
    assert (len(linear), len(cosine)) == (9, 3)
    assert {point["schedule.beta_end"] for point in linear} == {0.01, 0.02, 0.04}
    assert all(set(point) == {"schedule.kind", "optim.lr"} for point in cosine)
    assert space.parse(flags, DIGITS).grid(5) == found[:5]


def test_a_key_of_another_choice_is_varied_only_where_it_is_read() -> None:
    flags = ["objective.min_snr_gamma=1|5", "objective.weight=simple|min_snr", "optim.lr=1e-3|1e-4"]
    points = space.parse(flags, DIGITS).grid(100)
    of_simple = [point for point in points if point["objective.weight"] == "simple"]
    assert (len(points), len(of_simple)) == (6, 2)
    assert all(("objective.min_snr_gamma" in point) == (point not in of_simple) for point in points)
    with pytest.raises(
        UserError, match=r"objective\.min_snr_gamma changes nothing.* objective\.weight min_snr"
    ):
        space.parse(["objective.min_snr_gamma=uniform(1,5)", "objective.weight=simple|edm"], DIGITS)


def test_random_trials_have_only_the_keys_of_their_kind() -> None:
    found = space.parse(DEFAULT, DIGITS)

    def points(seed: int) -> list[Any]:
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
        trials = [study.ask() for _ in range(40)]
        for trial in trials:
            found.suggest(trial)
        return [trial.params for trial in trials]

    assert points(7) == points(7) != points(8)
    assert {point["schedule.kind"] for point in points(7)} == set(SCHEDULES)
    for point in points(7):
        read = {
            *SCHEDULES[point["schedule.kind"]].reads,
            "schedule.kind",
            "schedule.num_timesteps",
            "optim.lr",
        }
        assert set(point) == read & {flag.partition("=")[0] for flag in DEFAULT}
        loop.check(override(DIGITS, point))


@pytest.mark.parametrize("preset", PRESETS)
def test_the_default_space_fits_every_preset(preset: str) -> None:
    assert "schedule.kind" in space.parse(DEFAULT, PRESETS[preset]).domains


def test_the_documented_minimum_noise_is_true() -> None:
    source = (REPO / "ddpm/search/space.py").read_text()
    documented = re.search(
        r"linear from 1e-4: from too little noise \(sqrt\(alpha_bar_T\) = ([\d.]+)\)", source
    )
    assert documented and "schedule.beta_end=log(0.005,0.1)" in DEFAULT
    least = schedules.linear(1000, 1e-4, 0.005).alpha_bar[-1].sqrt().item()
    assert float(documented[1]) == pytest.approx(least, abs=0.005)


def test_values_get_the_types_of_the_config() -> None:
    flags = [
        "optim.lr=1|1e-3",
        "model.attention_head_dim=none|8",
        "model.middle_attention=true|false",
        "objective.predict=eps|v|edm|flow",
        "objective.timesteps=uniform|log_normal",
        "objective.log_sigma_mean=uniform(-2,1)",
    ]
    found = space.parse(flags, DIGITS).domains
    assert [space.ends(found[flag.partition("=")[0]]) for flag in flags] == [
        (1.0, 0.001),
        (None, 8),
        (True, False),
        ("eps", "v", "edm", "flow"),
        ("uniform", "log_normal"),
        (-2.0, 1.0),
    ]
    assert isinstance(space.ends(found["optim.lr"])[0], float)


BAD = {
    "optim.lr": "has no domain",
    "lr=log(1e-4,1e-2)": "did you mean optim.lr?",
    "optim.rate=1|2": "'optim.rate'",
    "optim.lr=log(0,1)": "a logarithm's low bound must be above 0",
    "optim.lr=uniform(1,0.1)": "the low one below the high one",
    "optim.lr=uniform(nan,1)": "bounds must be finite",
    "optim.lr=uniform(a,b)": "bounds must be numbers",
    "optim.lr=__import__('os').abort()": "is not understood",
    "optim.lr=fast|slow": "optim.lr=fast: config: optim.lr is 'fast'",
    "optim.lr=1e-3|0.001": "has a value twice",
    "schedule.kind=linear|warp": "kind is 'warp'",
    "schedule.num_timesteps=uniform(100,200)": "it must be a valid integer",
    "schedule.num_timesteps=int(1.5,20)": "bounds must be whole numbers",
    "schedule.num_timesteps=int(0,100)": "schedule.num_timesteps is 0",
    "schedule.num_timesteps=int(10,1e6)": "at most 10,000 are allowed",
    "schedule.cosine_s=uniform(0,2)": "schedule.cosine_s is 2.0",
    "schedule.beta_end=log(0.01,0.1)": "schedule.kind linear or scaled_linear",
    "train.total_images=100|200": "cannot vary train.total_images",
    "cluster.num_workers=1|2": "cannot vary cluster.num_workers",
    "objective.process=gaussian|uniform_mix": "cannot vary objective.process",
    "model.norm_groups=7|8": "allows model.norm_groups 7, but",
}


@pytest.mark.parametrize(("flag", "message"), BAD.items(), ids=list(BAD))
def test_user_errors_are_one_line(flag: str, message: str) -> None:
    with pytest.raises(UserError) as raised:
        space.parse([flag], DIGITS)
    assert message in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("domain", ["0|10", "10|0", "int(0,10)"])
def test_nets_with_and_without_labels_cannot_be_mixed(domain: str) -> None:
    with pytest.raises(UserError) as raised:
        space.parse([f"model.num_classes={domain}", "optim.lr=1e-3|1e-4"], DIGITS)
    message = str(raised.value)
    assert "cannot mix nets with and without labels, here model.num_classes 0 and 10" in message
    assert "log p(x | y)" in message and "\n" not in message
    for flags in (["model.num_classes=10", "objective.label_dropout=0|0.5"], ["model.num_classes=0"]):
        assert set(space.parse(flags, DIGITS).domains) == {flag.partition("=")[0] for flag in flags}


def test_inconsistent_bounds_are_rejected() -> None:
    flags = ["schedule.kind=linear", "schedule.beta_start=log(1e-4,0.1)", "schedule.beta_end=log(0.01,0.5)"]
    with pytest.raises(UserError, match=r"schedule\.beta_end 0\.01"):
        space.parse(flags, DIGITS)
    with pytest.raises(UserError, match=r"optim\.lr twice"):
        space.parse(["optim.lr=1|2", "optim.lr=3|4"], DIGITS)
