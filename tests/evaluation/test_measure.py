"""Bits/dim and features of a net: the values of image i do not depend on its batch."""

from typing import Any

import numpy as np
import pytest
import torch

from ddpm.build import build_net, build_objective
from ddpm.config import Config, override
from ddpm.data.reading import DataSet, Images
from ddpm.diffusion.reverse import Variance
from ddpm.evaluation import measure
from ddpm.evaluation.bits import BitsPerDim
from ddpm.evaluation.features import features_of
from ddpm.evaluation.pixels import Pixels
from ddpm.sampling import generate
from ddpm.utils.errors import UserError

CPU = torch.device("cpu")


def make_net(config: Config) -> tuple:
    config = override(config, {"model.zero_init": False})
    net = build_net(config).eval().requires_grad_(False)
    return net, config, build_objective(config)


def part(images: Images, start: int, stop: int) -> Images:
    return Images(images.image[start:stop], images.label[start:stop])


def measure_options(net: tuple, images: Images, variance: Variance = "beta_tilde") -> dict[str, Any]:
    """Arguments of bits_per_dim."""
    found = measure.measure(*net, part(images, 0, 8), variance, device=CPU)
    return {"device": CPU, "variance": variance, "measured": found}


@pytest.fixture
def held_out(train_set: DataSet) -> Images:
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
    tiny: Config, held_out: Images, change: dict[str, Any], estimated: bool
) -> None:
    net = make_net(override(tiny, change))
    variance = measure.bound_variance(net[1])
    options = measure_options(net, held_out, variance) | {"num_draws": 3 if estimated else 0}
    whole = measure.bits_per_dim(*net, held_out, start=0, **options)
    parts = [
        measure.bits_per_dim(*net, part(held_out, a, b), start=a, **options)
        for a, b in ((0, 2), (2, 5), (5, 12))
    ]
    merged = BitsPerDim.merge(*parts)
    for term in ("prior", "kl", "decoder"):
        np.testing.assert_allclose(getattr(merged, term), getattr(whole, term), rtol=1e-4, atol=1e-6)
    other = measure.bits_per_dim(*net, held_out, start=0, seed=1, **options)
    assert (other.kl != whole.kl).any()


def test_an_estimate_agrees_with_the_sum_over_all_timesteps(tiny: Config, held_out: Images) -> None:
    net = make_net(tiny)
    options = measure_options(net, held_out)
    exact = measure.bits_per_dim(*net, held_out, start=0, num_draws=0, **options)
    found = measure.bits_per_dim(*net, held_out, start=0, num_draws=8, seed=1, **options)
    difference = found.kl - exact.kl
    assert abs(difference.mean()) < 4 * difference.std(ddof=1) / len(difference) ** 0.5
    np.testing.assert_allclose(found.prior, exact.prior)


def test_bits_depend_on_the_labels(tiny: Config, held_out: Images) -> None:
    net = make_net(override(tiny, {"model.num_classes": 10}))
    wrong = Images(held_out.image, (held_out.label + 1) % 10)
    options = measure_options(net, held_out)
    found = [measure.bits_per_dim(*net, images, start=0, **options).kl for images in (held_out, wrong)]
    assert (found[0] != found[1]).all()


def test_uniform_mix_has_no_bound(tiny: Config, held_out: Images) -> None:
    net = make_net(override(tiny, {"objective.process": "uniform_mix"}))
    with pytest.raises(UserError, match="uniform_mix has no variational bound"):
        measure.measure(*net, held_out, "measured", device=CPU)


def test_features_equal_those_of_the_sampled_images(tiny: Config) -> None:
    net, config, objective = make_net(tiny)
    pixels = Pixels((8, 8, 1))
    drawn = generate.draw(net, config, objective, range(5), device=CPU)
    parts = [
        measure.drawn_features(net, config, objective, pixels, indices, device=CPU)[0]
        for indices in (range(3), range(3, 5))
    ]
    # Another batch size may use other kernels: at most one grey level of difference.
    np.testing.assert_allclose(np.concatenate(parts), features_of(pixels, drawn), atol=1.01 / 127.5)


def test_the_bound_uses_the_best_variance_of_the_net(tiny: Config, held_out: Images) -> None:
    """Unless another variance is requested; `measured`, on the evaluated images, is better than the fixed ones."""
    learned = override(tiny, {"objective.variance": "learned"})
    assert [measure.bound_variance(config) for config in (tiny, learned)] == ["measured", "learned"]
    assert measure.bound_variance(learned, "measured") == "measured"
    with pytest.raises(UserError, match="this net did not learn it"):
        measure.bound_variance(tiny, "learned")
    net, found = make_net(tiny), {}
    for variance in ("measured", "beta", "beta_tilde"):
        how = measure_options(net, held_out, variance)  # type: ignore[arg-type]
        found[variance] = measure.bits_per_dim(*net, held_out, start=0, num_draws=0, **how).kl.mean()
    assert min(found.values()) == found["measured"] < 0.9 * found["beta_tilde"]
