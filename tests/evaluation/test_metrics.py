"""Metrics against closed forms, definitions and torch-fidelity."""

import numpy as np
import pytest
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from ddpm.evaluation.jackknife import jackknife_error
from ddpm.evaluation.metrics import Distances, Moments, fid, kid, projection


def normal(n, size=8, seed=0, mean=0.0, std=1.0):
    return (mean + std * np.random.RandomState(seed).standard_normal((n, size))).astype(np.float32)


def with_moments(mean, covariance):
    return Moments(np.array(mean, float), np.array(covariance, float))


def test_fid_of_two_gaussians_in_closed_form():
    """Commuting covariances: |m - m'|^2 + sum (sqrt(a) - sqrt(b))^2; and any pair of 2x2 matrices, whose root's
    trace is sqrt(tr(AB) + 2 sqrt(det(AB)))."""
    a = with_moments([1, 2, 0], np.diag([4.0, 1.0, 0.0]))
    b = with_moments([0, 2, 2], np.diag([1.0, 9.0, 2.25]))
    assert fid(a, b) == pytest.approx(5 + 1 + 4 + 2.25, abs=1e-12)
    assert fid(a, b) == pytest.approx(fid(b, a), abs=1e-12)
    assert fid(a, a) == pytest.approx(0, abs=1e-12)
    first = np.array([[2.0, 0.5], [0.5, 1.0]])
    second = np.array([[1.0, -0.8], [-0.8, 3.0]])
    product = first @ second
    cross = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    right = np.trace(first) + np.trace(second) - 2 * cross
    assert fid(with_moments([0, 0], first), with_moments([0, 0], second)) == pytest.approx(right, abs=1e-12)


def test_fid_equals_that_of_torch_fidelity():
    x = normal(300, 16) @ normal(16, 16, 3)
    y = normal(200, 16, 1, 0.3) @ normal(16, 16, 4)
    theirs = [fid_features_to_statistics(torch.from_numpy(f.astype(np.float64))) for f in (x, y)]
    right = fid_statistics_to_metric(*theirs, verbose=False)["frechet_inception_distance"]
    assert fid(Moments.of(x), Moments.of(y)) == pytest.approx(right, rel=1e-9)


def test_moments_far_from_0_lose_no_digits():
    x = normal(101, 5, mean=1000.0)  # where sums of squares would
    moments = Moments.of(x)
    np.testing.assert_allclose(moments.mean, x.astype(float).mean(0), rtol=1e-15)
    np.testing.assert_allclose(
        moments.covariance, np.cov(x.astype(float), rowvar=False), rtol=1e-11, atol=1e-12
    )


def test_kid_equals_that_of_torch_fidelity():
    x = normal(150)
    y = normal(150, seed=1, mean=0.4)
    right = kid_features_to_metric(
        torch.from_numpy(x.astype(np.float64)),
        torch.from_numpy(y.astype(np.float64)),
        kid_subsets=1,
        kid_subset_size=150,  # one subset, of all
    )["kernel_inception_distance_mean"]
    assert kid(x, y).value == pytest.approx(right, rel=1e-9)


def test_kid_follows_the_definition_with_unequal_numbers():
    x = normal(7, 3).astype(float)
    y = normal(5, 3, 1).astype(float)

    def k(a, b):
        return (a @ b / 3 + 1) ** 3

    own = np.mean([k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j])
    of_real = np.mean([k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j])
    assert kid(x, y).value == pytest.approx(own + of_real - 2 * np.mean([k(a, b) for a in x for b in y]))
    without_x = np.array([kid(np.delete(x, i, 0), y).value for i in range(7)])
    without_y = np.array([kid(x, np.delete(y, i, 0)).value for i in range(5)])
    assert kid(x, y).error == pytest.approx(jackknife_error(without_x, without_y))


def test_the_error_of_kid_is_stratified_by_class():
    """Ten clusters with equal numbers of generated images: the spread between clusters is not an error of that side."""
    centres = normal(10, 8, std=2.0)
    classes = np.arange(200) % 10
    found = []
    for seed in range(150):
        chance = np.random.RandomState(seed).randint(0, 10, 200)  # the classes of real images are random too
        generated = centres[classes] + normal(200, 8, 2 * seed, 0.3)
        real = centres[chance] + normal(200, 8, 2 * seed + 1)
        found.append(
            (kid(generated, real, classes).value, *(kid(generated, real, c).error for c in (classes, None)))
        )
    values, stratified, plain = np.array(found).T
    assert 0.9 < stratified.mean() / values.std() < 1.2 < plain.mean() / values.std()
    one_each = kid(generated, real, np.arange(200))
    assert one_each == kid(generated, real)  # if no class has two images, the spread of all together is used


def test_precision_and_recall_equal_those_of_torch_fidelity():
    generated = normal(120, 4, std=0.8)
    real = normal(90, 4, 1)
    right = prc_features_to_metric(
        torch.from_numpy(generated.astype(float)), torch.from_numpy(real.astype(float)), prc_neighborhood=3
    )
    ours = Distances(generated, real).manifold()
    assert ours.precision == pytest.approx(right["precision"])
    assert ours.recall == pytest.approx(right["recall"])
    assert 0 < ours.recall < ours.precision < 1


def test_rows_can_be_left_out():
    generated = normal(30)
    real = normal(30, seed=1)
    rows = np.arange(0, 30, 2)
    distances = Distances(generated, real)
    real_rows = np.arange(5, 25)
    assert distances.manifold(rows) == Distances(generated[rows], real).manifold()
    assert distances.manifold(real_rows=real_rows) == Distances(generated, real[real_rows]).manifold()
    assert distances.manifold(rows, real_rows) == Distances(generated[rows], real[real_rows]).manifold()
    assert distances.manifold() not in (distances.manifold(rows), distances.manifold(real_rows=real_rows))


def test_a_projection_is_orthonormal_and_always_the_same():
    basis = projection(300, 20)
    np.testing.assert_allclose(basis.T @ basis, np.eye(20), atol=1e-12)
    np.testing.assert_array_equal(basis, projection(300, 20))


@pytest.mark.parametrize(("n", "m"), [(2, 5), (5, 2)])
def test_too_few_images_for_kid(n, m):
    with pytest.raises(ValueError, match=f"{n} generated and {m} real"):
        kid(normal(n), normal(m))
