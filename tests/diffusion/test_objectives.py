"""Objectives: the distribution of t and noise, the loss, and the meaning of predictions."""

import pytest
import torch

from ddpm.config import ObjectiveConfig
from ddpm.diffusion import objectives, process, schedules
from ddpm.diffusion.objectives import X0, Eps, Labels, UniformMix, V
from ddpm.utils.generators import PhiloxGenerator

SCHEDULE = schedules.linear(1000, 1e-4, 0.02)
GAUSSIAN = [Eps, X0, V]


def generator(seed=0):
    return PhiloxGenerator(seed)


class RecordingModel:
    """A model that records its inputs."""

    def __init__(self, output=torch.zeros_like):
        self.output, self.calls = output, []

    def __call__(self, x_t, t, label):
        self.calls.append((x_t, t, label))
        return self.output(x_t)


def images(n=64, shape=(1, 4, 4), seed=1):
    return 2 * generator(seed).uniform((n, *shape)) - 1


@pytest.mark.parametrize("kind", GAUSSIAN)
def test_t_is_uniform_over_all_steps_from_the_first_to_the_last(kind):
    schedule = schedules.linear(8, 1e-4, 0.02)
    spy = RecordingModel()
    loss = kind(schedule).loss(spy, images(4000, (1, 1, 1)), None, generator())
    t = spy.calls[0][1]
    assert t.dtype == torch.int64 and t.shape == (4000,)
    count = torch.bincount(t, minlength=8)
    assert len(count) == 8
    assert ((count - 500).abs() < 5 * (4000 * 1 / 8 * 7 / 8) ** 0.5).all()
    assert torch.equal(loss.quarter, t // 2)


@pytest.mark.parametrize("kind", GAUSSIAN)
def test_noise_and_t_differ_from_image_to_image(kind):
    spy = RecordingModel()
    x_0 = torch.zeros(16, 3, 8, 8)
    kind(SCHEDULE).loss(spy, x_0, None, generator())
    x_t, t, _ = spy.calls[0]
    eps = process.predict_eps_from_x_0(SCHEDULE.alpha_bar, x_t, t, x_0)
    assert len(t.unique()) > 10
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
    (loss, x_t), (other, _) = draw(3), draw(4)
    torch.manual_seed(1)
    again, x_t_again = draw(3)
    assert torch.equal(x_t, x_t_again) and torch.equal(loss.per_image, again.per_image)
    assert not torch.equal(loss.per_image, other.per_image)


@pytest.mark.parametrize("kind", GAUSSIAN)
def test_a_perfect_net_has_no_loss(kind):
    """All images are one and the same point c, so the net can know x_0 and from it eps and v."""
    c = 0.3

    def model(x_t, t, label):
        x_0 = torch.full_like(x_t, c)
        eps = process.predict_eps_from_x_0(SCHEDULE.alpha_bar, x_t, t, x_0)
        v = process.v_from(SCHEDULE.alpha_bar, x_0, t, eps)
        return {Eps: eps, X0: x_0, V: v}[kind]

    loss = kind(SCHEDULE).loss(model, torch.full((64, 1, 4, 4), c), None, generator())
    assert loss.value < 1e-6 and loss.per_image.max() < 1e-6


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
    s, alpha_bar = 0.5, schedule.alpha_bar
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
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weighs_every_prediction_as_one_x_0_loss(kind, gamma):
    """Hang et al. 2023: whatever is predicted, the loss is min(snr, gamma) |x_0 - x_0_hat|^2."""
    objective = kind(SCHEDULE, min_snr_gamma=gamma)
    spy = RecordingModel(lambda x: 0.1 * x)
    x_0 = images(32).double()
    loss = objective.loss(spy, x_0, None, generator())
    x_t, t, _ = spy.calls[0]
    x_0_hat = objective.denoise(spy, x_t, t, None).x_0_hat
    error = (x_0 - x_0_hat).square().flatten(1).mean(1)
    expected = (SCHEDULE.snr[t].clamp(max=gamma) * error).mean()
    torch.testing.assert_close(loss.value, expected, rtol=1e-6, atol=0)


def test_min_snr_weights_are_those_of_the_paper():
    snr, gamma = SCHEDULE.snr, 5.0
    capped = snr.minimum(torch.tensor(gamma))
    for kind, expected in [(Eps, capped / snr), (X0, capped), (V, capped / (snr + 1))]:
        torch.testing.assert_close(kind(SCHEDULE, min_snr_gamma=gamma).weight, expected)
        assert (kind(SCHEDULE).weight == 1).all()


@pytest.mark.parametrize("kind", GAUSSIAN)
def test_per_image_is_unweighted_and_detached(kind):
    scale = torch.ones((), requires_grad=True)
    weighted, simple = (
        kind(SCHEDULE, min_snr_gamma=gamma).loss(lambda x, t, y: scale * x, images(), None, generator())
        for gamma in (5.0, None)
    )
    assert torch.equal(weighted.per_image, simple.per_image) and not weighted.per_image.requires_grad
    torch.testing.assert_close(simple.per_image.mean(), simple.value.detach())
    assert weighted.value.item() != pytest.approx(simple.value.item(), rel=1e-3)
    weighted.value.backward()
    assert scale.grad is not None and scale.grad != 0


@pytest.mark.parametrize("schedule", [SCHEDULE, schedules.cosine(1000)])
@pytest.mark.parametrize("kind", GAUSSIAN)
def test_denoise_gives_the_same_result_for_every_prediction(kind, schedule):
    x_0, t = images(8).double(), torch.tensor([0, 1, 10, 100, 500, 900, 998, 999])
    eps = generator(2).normal(x_0.shape, torch.float64)
    x_t = process.q_sample(schedule.alpha_bar, x_0, t, eps)
    v = process.v_from(schedule.alpha_bar, x_0, t, eps)
    denoised = kind(schedule).denoise(lambda x, t, y: {Eps: eps, X0: x_0, V: v}[kind], x_t, t, None)
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
    def test_are_dropped_image_by_image(self, make):
        spy = RecordingModel()
        label = torch.arange(4000) % 10
        make(Labels(10, dropout=0.25)).loss(spy, images(4000, (1, 1, 1)), label, generator())
        given = spy.calls[0][2]
        dropped = given == 10
        assert torch.equal(given[~dropped], label[~dropped])
        assert abs(dropped.sum().item() - 1000) < 5 * (4000 * 0.25 * 0.75) ** 0.5
        assert torch.equal(label, torch.arange(4000) % 10)  # the caller's tensor is not modified

    @pytest.mark.parametrize(("dropout", "expected"), [(0.0, 3), (1.0, 10)])
    def test_none_or_all_dropped(self, make, dropout, expected):
        spy = RecordingModel()
        label = torch.full((100,), 3)
        make(Labels(10, dropout)).loss(spy, images(100), label, generator())
        assert (spy.calls[0][2] == expected).all()

    def test_no_label_in_sampling_is_the_null_label(self, make):
        spy, objective = RecordingModel(), make(Labels(10, 0.5))
        t = torch.tensor([5, 6]) if isinstance(objective, Eps) else torch.tensor([0.5, 0.6])
        objective.denoise(spy, images(2), t, None)
        objective.denoise(spy, images(2), t, torch.tensor([3, 10]))
        assert [call[2].tolist() for call in spy.calls] == [[10, 10], [3, 10]]
        assert spy.calls[0][2].dtype == torch.int64

    def test_do_not_reach_an_unconditional_net(self, make):
        spy = RecordingModel()
        make(Labels(0, 0.5)).loss(spy, images(4), torch.arange(4), generator())
        assert spy.calls[0][2] is None

    def test_missing_in_training_are_an_error(self, make):
        with pytest.raises(ValueError, match="label is None; with num_classes = 10"):
            make(Labels(10)).loss(RecordingModel(), images(4), None, generator())


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
    x_0, u = images(4).double(), images(4, seed=7).double()
    amount = torch.tensor([0.01, 0.3, 0.7, 1.0])
    x_t = process.mix(x_0, amount, u)
    denoised = UniformMix().denoise(lambda x, t, y: x_0, x_t, amount, None)
    torch.testing.assert_close(denoised.x_0_hat, x_0)
    torch.testing.assert_close(denoised.eps_hat, u, rtol=1e-9, atol=1e-9)
    clean = UniformMix().denoise(lambda x, t, y: x_0, x_0, torch.zeros(4), None)
    assert clean.eps_hat.isfinite().all()


def test_build():
    def built(num_classes=0, **changes):
        return objectives.build(ObjectiveConfig(**changes), SCHEDULE, num_classes)

    assert built() == Eps(SCHEDULE, Labels(0, 0.1))
    assert built(10, predict="x_0", label_dropout=0.2) == X0(SCHEDULE, Labels(10, 0.2))
    assert built(predict="v", weight="min_snr", min_snr_gamma=3.0) == V(SCHEDULE, Labels(0, 0.1), 3.0)
    assert built(3, process="uniform_mix") == UniformMix(Labels(3, 0.1))  # whatever `predict` is


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: objectives.build(ObjectiveConfig(predict="score"), SCHEDULE, 0), "'score'.*eps, x_0, v"),
        (lambda: objectives.build(ObjectiveConfig(label_dropout=1.1), SCHEDULE, 0), "label_dropout is 1.1"),
        (lambda: objectives.build(ObjectiveConfig(), SCHEDULE, -1), "num_classes is -1"),
        (lambda: Eps(SCHEDULE, min_snr_gamma=0.0), "min_snr_gamma is 0.0"),
        (
            lambda: Eps(SCHEDULE).loss(lambda x, t, y: x[:, :1], images(4, (3, 2, 2)), None, generator()),
            r"model returned shape \(4, 1, 2, 2\)",
        ),
        (
            lambda: UniformMix().denoise(RecordingModel(), images(1), torch.tensor([3]), None),
            "t is torch.int64; for UniformMix it is the amount",
        ),
    ],
)
def test_invalid_arguments_are_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
