"""Objectives: the distribution of t and noise, the loss, and the meaning of predictions."""

from dataclasses import replace

import pytest
import torch

from ddpm.build import build_objective
from ddpm.config.json import override
from ddpm.config.tree import Config
from ddpm.diffusion import process, schedules
from ddpm.diffusion.objectives import X0, Edm, Eps, Flow, Gaussian, LabelConditioning, UniformMix, V
from ddpm.utils.generators import PhiloxGenerator

SCHEDULE = schedules.linear(1000, 1e-4, 0.02)
GAUSSIAN = [Eps, X0, V, Edm, Flow]


def generator(seed=0):
    return PhiloxGenerator(seed)


class RecordingModel:
    """A model that records its inputs."""

    def __init__(self, output=torch.zeros_like):
        self.output = output
        self.calls = []

    def __call__(self, x_t, t, label):
        self.calls.append((x_t, t, label))
        return self.output(x_t)


def images(n=64, shape=(1, 4, 4), seed=1):
    return 2 * generator(seed).uniform((n, *shape)) - 1


@pytest.mark.parametrize("kind", GAUSSIAN)
def test_t_is_uniform_over_all_steps_from_the_first_to_the_last(kind):
    spy = RecordingModel()
    loss = kind(schedules.linear(8, 1e-4, 0.02)).loss(spy, images(4000, (1, 1, 1)), None, generator())
    t = spy.calls[0][1]
    count = torch.bincount(t, minlength=8)
    assert len(count) == 8
    assert ((count - 500).abs() < 5 * (4000 * 1 / 8 * 7 / 8) ** 0.5).all()
    assert torch.equal(loss.quarter, t // 2)


@pytest.mark.parametrize("kind", [Eps, X0, V])
def test_noise_differs_from_image_to_image(kind):
    spy = RecordingModel()
    x_0 = torch.zeros(16, 3, 8, 8)
    kind(SCHEDULE).loss(spy, x_0, None, generator())
    x_t, t, _ = spy.calls[0]
    eps = process.predict_eps_from_x_0(SCHEDULE.alpha_bar, x_t, t, x_0)
    # Independent standard normal: unit variance, and no correlation between two images (192 values each).
    correlation = torch.corrcoef(eps.flatten(1))
    assert (correlation - torch.eye(16)).abs().max() < 5 / 192**0.5
    assert eps.var().item() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("objective", [*[kind(SCHEDULE) for kind in GAUSSIAN], UniformMix()])
def test_the_loss_depends_only_on_the_generator(objective):
    def draw(seed):
        spy = RecordingModel(lambda x_t: x_t)
        return objective.loss(spy, images(), None, generator(seed)), spy.calls[0][0]

    torch.manual_seed(0)
    loss, x_t = draw(3)
    other, _ = draw(4)
    torch.manual_seed(1)
    again, x_t_again = draw(3)
    assert torch.equal(x_t, x_t_again) and torch.equal(loss.per_image, again.per_image)
    assert not torch.equal(loss.per_image, other.per_image)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (schedules.linear(1000, 1e-4, 0.01), 0.24),
        (schedules.linear(1000, 1e-4, 0.04), 0.12),
        (schedules.cosine(1000), 0.33),
    ],
)
def test_eps_loss_of_a_perfect_net_depends_on_the_schedule(schedule, expected):
    """x_0 ~ N(0, s^2), s = 1/2: E|eps - E[eps | x_t]|^2 = alpha_bar s^2 / (alpha_bar s^2 + 1 - alpha_bar)."""
    s = 0.5
    alpha_bar = schedule.alpha_bar
    variance = alpha_bar * s**2 + 1 - alpha_bar
    analytic = (alpha_bar * s**2 / variance).mean().item()
    assert analytic == pytest.approx(expected, abs=0.006)

    def model(x_t, t, label):
        return process.gather((1 - alpha_bar).sqrt() / variance, t, x_t) * x_t

    x_0 = s * generator(5).normal((20_000, 1, 2, 2))
    loss = Eps(schedule).loss(model, x_0, None, generator())
    standard_error = loss.per_image.std().item() / 20_000**0.5
    assert abs(loss.value.item() - analytic) < 4 * standard_error < 0.02


@pytest.mark.parametrize("kind", GAUSSIAN)
@pytest.mark.parametrize(
    ("weighting", "gamma", "weight"),
    [
        ("min_snr", 1.0, lambda sigma: (sigma**-2).clamp(max=1)),
        ("min_snr", 5.0, lambda sigma: (sigma**-2).clamp(max=5)),
        ("edm", 1.0, lambda sigma: (sigma**2 + 0.5**2) / (sigma * 0.5) ** 2),
        ("flow", 1.0, lambda sigma: (1 + 1 / sigma) ** 2),
    ],
)
def test_a_weight_weighs_every_prediction_as_one_x_0_loss(kind, weighting, gamma, weight):
    """Hang et al. 2023, min(snr, gamma); Karras et al. 2022, Table 1, lambda(sigma); |eps - x_0|^2 of flow matching."""
    objective = kind(SCHEDULE, weighting=weighting, min_snr_gamma=gamma)
    spy = RecordingModel(lambda x: 0.1 * x)
    x_0 = images(32).double()
    loss = objective.loss(spy, x_0, None, generator())
    given, t, _ = spy.calls[0]
    x_t = given / objective._input(torch.ones_like(given), t)
    x_0_hat = objective.denoise(spy, x_t, t, None).x_0_hat
    error = (x_0 - x_0_hat).square().flatten(1).mean(1)
    expected = (weight(SCHEDULE.sigma[t]) * error).mean()
    torch.testing.assert_close(loss.value, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(kind(SCHEDULE).weight, torch.ones(1000).double(), rtol=0, atol=0)


@pytest.mark.parametrize("kind", GAUSSIAN)
def test_per_image_is_unweighted_and_detached(kind):
    scale = torch.ones((), requires_grad=True)
    weighted, simple = (
        kind(SCHEDULE, weighting=weight).loss(lambda x, t, y: scale * x, images(), None, generator())
        for weight in ("min_snr", "simple")
    )
    assert torch.equal(weighted.per_image, simple.per_image) and not weighted.per_image.requires_grad
    torch.testing.assert_close(simple.per_image.mean(), simple.value.detach())
    assert weighted.value.item() != pytest.approx(simple.value.item(), rel=1e-3)
    weighted.value.backward()
    assert scale.grad is not None and scale.grad != 0


@pytest.mark.parametrize("schedule", [SCHEDULE, schedules.cosine(1000)])
@pytest.mark.parametrize("kind", GAUSSIAN)
def test_denoise_gives_the_same_result_for_every_prediction(kind, schedule):
    x_0 = images(8).double()
    t = torch.tensor([0, 1, 10, 100, 500, 900, 998, 999])
    eps = generator(2).normal(x_0.shape, torch.float64)
    x_t = process.q_sample(schedule.alpha_bar, x_0, t, eps)
    v = process.v_from(schedule.alpha_bar, x_0, t, eps)
    sigma = schedule.sigma[t].view(-1, 1, 1, 1)
    c_skip = 0.25 / (sigma**2 + 0.25)
    c_out = sigma * 0.5 * (sigma**2 + 0.25).rsqrt()  # Karras et al. 2022, Table 1
    edm = (x_0 - c_skip * (x_0 + sigma * eps)) / c_out
    target = {Eps: eps, X0: x_0, V: v, Edm: edm, Flow: eps - x_0}[kind]
    denoised = kind(schedule).denoise(lambda x, t, y: target, x_t, t, None)
    torch.testing.assert_close(denoised.x_0_hat, x_0, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(denoised.eps_hat, eps, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", GAUSSIAN)
def test_a_half_precision_net_is_scored_and_read_in_float32(kind):
    loss = kind(SCHEDULE).loss(lambda x, t, y: x.bfloat16(), images(), None, generator())
    assert loss.value.dtype == loss.per_image.dtype == torch.float32
    denoised = kind(SCHEDULE).denoise(lambda x, t, y: x.bfloat16(), images(2), torch.tensor([0, 999]), None)
    assert denoised.x_0_hat.dtype == denoised.eps_hat.dtype == torch.float32


@pytest.mark.parametrize("make", [lambda labels: Eps(SCHEDULE, labels), UniformMix])
class TestLabels:
    @pytest.mark.parametrize("dropout", [0.0, 0.25, 1.0])
    def test_are_dropped_image_by_image(self, make, dropout):
        spy = RecordingModel()
        label = torch.arange(4000) % 10
        make(LabelConditioning(10, dropout)).loss(spy, images(4000, (1, 1, 1)), label, generator())
        given = spy.calls[0][2]
        dropped = given == 10
        assert torch.equal(given[~dropped], label[~dropped])
        error = abs(dropped.sum().item() - 4000 * dropout)
        assert error <= 5 * (4000 * dropout * (1 - dropout)) ** 0.5
        assert torch.equal(label, torch.arange(4000) % 10)  # the caller's tensor is not modified

    def test_no_label_in_sampling_is_the_null_label(self, make):
        spy = RecordingModel()
        objective = make(LabelConditioning(10, 0.5))
        t = torch.tensor([5, 6]) if isinstance(objective, Eps) else torch.tensor([0.5, 0.6])
        objective.denoise(spy, images(2), t, None)
        objective.denoise(spy, images(2), t, torch.tensor([3, 10]))
        assert [call[2].tolist() for call in spy.calls] == [[10, 10], [3, 10]]
        assert spy.calls[0][2].dtype == torch.int64

    def test_do_not_reach_an_unconditional_net(self, make):
        spy = RecordingModel()
        make(LabelConditioning(0, 0.5)).loss(spy, images(4), torch.arange(4), generator())
        assert spy.calls[0][2] is None

    def test_missing_in_training_are_an_error(self, make):
        with pytest.raises(ValueError, match="label is None; with num_classes = 10"):
            make(LabelConditioning(10)).loss(RecordingModel(), images(4), None, generator())


def test_uniform_mix_draws_amount_and_u_uniformly_and_gives_no_timestep():
    spy = RecordingModel()
    loss = UniformMix().loss(spy, torch.full((4000, 1, 4, 4), 1.0), None, generator())
    x_t, t, _ = spy.calls[0]
    assert t is None
    # x_t = 1 - amount (1 - u) with 1 - u uniform in [0, 2): mean amount per image (16 pixels), span [-1, 1].
    assert -1 <= x_t.min() < -0.9 and 0.99 < x_t.max() <= 1
    deviation = 1 - x_t.flatten(1)
    amount = deviation.mean(1)
    assert amount.mean().item() == pytest.approx(0.5, abs=0.02)
    assert amount.min() < 0.01 and amount.max() > 0.95
    assert torch.bincount(loss.quarter, minlength=4).tolist() == pytest.approx([1000] * 4, abs=150)
    # u is below 1, so no deviation exceeds twice the amount: the quarter is where the amount lies.
    for quarter in range(4):
        assert deviation[loss.quarter == quarter].max() <= (quarter + 1) / 2
        assert deviation[loss.quarter == quarter].max() > (quarter + 1) / 2 - 0.1


def test_uniform_mix_scores_the_clean_image():
    x_0 = images(32)
    assert UniformMix().loss(lambda x, t, y: x_0, x_0, None, generator()).value == 0
    loss = UniformMix().loss(lambda x, t, y: x_0 + 0.5, x_0, None, generator())
    torch.testing.assert_close(loss.value, torch.tensor(0.25))


def test_uniform_mix_denoise_implies_u():
    x_0 = images(4).double()
    u = images(4, seed=7).double()
    amount = torch.tensor([0.01, 0.3, 0.7, 1.0])
    x_t = process.mix(x_0, amount, u)
    denoised = UniformMix().denoise(lambda x, t, y: x_0, x_t, amount, None)
    torch.testing.assert_close(denoised.x_0_hat, x_0)
    torch.testing.assert_close(denoised.eps_hat, u, rtol=1e-9, atol=1e-9)
    clean = UniformMix().denoise(lambda x, t, y: x_0, x_0, torch.zeros(4), None)
    assert clean.eps_hat.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, Eps(SCHEDULE, LabelConditioning(0, 0.1))),
        (
            {"model.num_classes": 10, "objective.predict": "x_0", "objective.label_dropout": 0.2},
            X0(SCHEDULE, LabelConditioning(10, 0.2)),
        ),
        (
            {"objective.predict": "v", "objective.weight": "min_snr", "objective.min_snr_gamma": 3.0},
            V(SCHEDULE, LabelConditioning(0, 0.1), "min_snr", 3.0),
        ),
        # whatever `predict` is
        ({"model.num_classes": 3, "objective.process": "uniform_mix"}, UniformMix(LabelConditioning(3, 0.1))),
    ],
)
def test_build(changes, expected):
    objective = build_objective(override(Config(), changes))
    assert type(objective) is type(expected) and objective.labels == expected.labels
    if isinstance(objective, Gaussian):
        assert torch.equal(objective.schedule.beta, SCHEDULE.beta)
        assert replace(objective, schedule=SCHEDULE) == expected
