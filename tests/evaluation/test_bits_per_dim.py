"""Bits/dim and features of a net: the values of image i do not depend on its batch."""

from functools import partial
from typing import Any

import numpy as np
import pytest

from ddpm.build import TrainedNet, build_net
from ddpm.config.json import override
from ddpm.config.tree import Config
from ddpm.data.reading import DataSet, LabelledImages
from ddpm.evaluation import bits_per_dim
from ddpm.utils.errors import UserError

KL = 1
"""Column of the sum of KL_t."""


def make_net(config: Config) -> TrainedNet:
    config = override(config, {"model.zero_init": False})
    return TrainedNet(build_net(config).eval().requires_grad_(False), config)


@pytest.fixture
def held_out(train_set: DataSet) -> LabelledImages:
    test = train_set.held_out()
    assert test is not None
    return test.read(test.plan(0, 200), 0, 12)


@pytest.mark.parametrize(
    "change",
    [{}, {"model.num_classes": 10}, {"objective.predict": "v"}, {"objective.variance": "learned"}],
    ids=str,
)
@pytest.mark.parametrize("estimated", [False, True])
def test_bits_of_image_i_do_not_depend_on_its_batch(
    tiny: Config, held_out: LabelledImages, change: dict[str, Any], estimated: bool
) -> None:
    net = make_net(override(tiny, change))
    bound_terms = partial(bits_per_dim.bound_terms, net, bits_per_dim.measure_errors(net, held_out[:8]))
    num_draws = 3 if estimated else 0
    whole = bound_terms(held_out, 0, num_draws)
    parts = [bound_terms(held_out[a:b], a, num_draws) for a, b in ((0, 2), (2, 5), (5, 12))]
    np.testing.assert_allclose(np.concatenate(parts), whole, rtol=1e-4, atol=1e-6)
    other = bound_terms(held_out, 0, num_draws, seed=1)
    assert (other[:, KL] != whole[:, KL]).any()


def test_an_estimate_agrees_with_the_sum_over_all_timesteps(tiny: Config, held_out: LabelledImages) -> None:
    net = make_net(tiny)
    measured = bits_per_dim.measure_errors(net, held_out[:8], "beta_tilde")
    exact = bits_per_dim.bound_terms(net, measured, held_out, 0, num_draws=0)
    estimated = bits_per_dim.bound_terms(net, measured, held_out, 0, num_draws=8, seed=1)
    difference = estimated[:, KL] - exact[:, KL]
    assert abs(difference.mean()) < 4 * difference.std(ddof=1) / len(difference) ** 0.5
    np.testing.assert_allclose(estimated[:, 0], exact[:, 0])


def test_bits_depend_on_the_labels(tiny: Config, held_out: LabelledImages) -> None:
    net = make_net(override(tiny, {"model.num_classes": 10}))
    wrong = LabelledImages(held_out.image, (held_out.label + 1) % 10)
    measured = bits_per_dim.measure_errors(net, held_out[:8])
    right, other = (bits_per_dim.bound_terms(net, measured, images, 0) for images in (held_out, wrong))
    assert (right[:, KL] != other[:, KL]).all()


def test_uniform_mix_has_no_bound(tiny: Config, held_out: LabelledImages) -> None:
    net = make_net(override(tiny, {"objective.process": "uniform_mix"}))
    with pytest.raises(UserError, match="uniform_mix has no variational bound"):
        bits_per_dim.measure_errors(net, held_out)


def test_the_bound_uses_the_best_variance_of_the_net(tiny: Config, held_out: LabelledImages) -> None:
    """Unless another variance is requested; `measured`, on the evaluated images, is better than the fixed ones."""
    learned = override(tiny, {"objective.variance": "learned"})
    assert [bits_per_dim.bound_variance(config) for config in (tiny, learned)] == ["measured", "learned"]
    assert bits_per_dim.bound_variance(learned, "measured") == "measured"
    with pytest.raises(UserError, match="this net did not learn it"):
        bits_per_dim.bound_variance(tiny, "learned")
    net = make_net(tiny)
    kl = {}
    for variance in ("measured", "beta", "beta_tilde"):
        measured = bits_per_dim.measure_errors(net, held_out[:8], variance)  # type: ignore[arg-type]
        kl[variance] = bits_per_dim.bound_terms(net, measured, held_out, 0, num_draws=0)[:, KL].mean()
    assert min(kl.values()) == kl["measured"] < 0.9 * kl["beta_tilde"]


def test_the_bound_has_an_error_over_images() -> None:
    value = np.arange(6.0)
    total = bits_per_dim.bound_score(np.stack([value / 100, 1.5 * value, 2 + value], 1))
    assert (total.name, total.n, total.n_real, total.floor) == ("bits/dim", 6, None, None)
    assert total.value == pytest.approx(2 + 2.51 * value.mean())
    assert total.error == pytest.approx(2.51 * value.std(ddof=1) / 6**0.5)
