"""Algorithm 1 end to end in one process: it learns, it resumes bit for bit, it stops on errors."""

import itertools
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from ddpm.build import build_objective
from ddpm.checkpoints import checkpoint
from ddpm.config import Config, override
from ddpm.data.reading import DataSet, Images
from ddpm.diffusion.objectives import Eps, Loss
from ddpm.evaluation import measure
from ddpm.presets import DIGITS
from ddpm.sampling import generate
from ddpm.training import loop
from ddpm.training.runtime import LocalRuntime, NoTracker, read_held_out
from ddpm.training.state import State
from ddpm.utils.errors import UserError


class RecordingTracker(NoTracker):
    """A tracker that keeps what is logged."""

    def __init__(self) -> None:
        self.rows: dict[int, dict[str, float]] = {}
        self.images: list[tuple[str, int]] = []
        self.files: set[str] = set()

    def metrics(self, values: dict[str, float], images_seen: int) -> None:
        self.rows.setdefault(images_seen, {}).update(values)

    def image(self, key: str, image: NDArray[np.uint8], images_seen: int) -> None:
        assert image.dtype == np.uint8 and image.ndim == 3
        self.images.append((key, images_seen))

    def artifact(self, name: str, data: bytes) -> None:
        self.files.add(name)


def fit(config: Config, data_set: DataSet, folder: Path, tracker: RecordingTracker | None = None) -> State:
    runtime = LocalRuntime(config, data_set, data_set.held_out(), folder)
    return loop.train(config, runtime, tracker or RecordingTracker())


def tensors(state: State) -> dict[str, torch.Tensor]:
    parts = (state.net.state_dict(), state.ema.state_dict(), state.optimizer_tensors())
    return {f"{i}.{name}": tensor for i, part in enumerate(parts) for name, tensor in part.items()}


def assert_same(a: State, b: State) -> None:
    first, second = tensors(a), tensors(b)
    assert first.keys() == second.keys() and len(first) > 100
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.mark.parametrize("variance", ["fixed", "learned"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_an_interrupted_run_equals_an_uninterrupted_one_bit_for_bit(
    tiny: Config, train_set: DataSet, tmp_path: Path, dropout: float, variance: str
) -> None:
    changes = {"model.dropout": dropout, "data.horizontal_flip": True, "objective.variance": variance}
    config = override(tiny, changes)
    straight = fit(config, train_set, tmp_path / "straight")

    class Interrupted(Exception):
        """Stands for the death of the process."""

    class KilledTracker(RecordingTracker):
        def metrics(self, values: dict[str, float], images_seen: int) -> None:
            if images_seen > 128:
                raise Interrupted

    with pytest.raises(Interrupted):
        fit(config, train_set, tmp_path / "broken", KilledTracker())
    resumed = fit(config, train_set, tmp_path / "broken")
    assert resumed.step == straight.step == 8
    assert_same(straight, resumed)


def test_training_depends_only_on_the_seeds(tiny: Config, train_set: DataSet, tmp_path: Path) -> None:
    first = fit(tiny, train_set, tmp_path / "a")
    torch.manual_seed(123)
    assert_same(first, fit(tiny, train_set, tmp_path / "b"))
    other = fit(override(tiny, {"train.seed": 1}), train_set, tmp_path / "c")
    assert any(
        not torch.equal(a, b) for a, b in zip(tensors(first).values(), tensors(other).values(), strict=True)
    )


@pytest.mark.parametrize("forward_images", [8, 16, 24])
def test_the_size_of_a_forward_pass_does_not_change_training(
    tiny: Config, train_set: DataSet, tmp_path: Path, forward_images: int
) -> None:
    """Images, flips, noise, t and dropped labels are equal: weights differ only by the order of summation."""
    changes = {"data.horizontal_flip": True, "model.num_classes": 10, "objective.variance": "learned"}
    config = override(tiny, changes)
    whole, parts = RecordingTracker(), RecordingTracker()
    one = tensors(fit(config, train_set, tmp_path / "whole", whole))
    several = fit(
        override(config, {"train.forward_images": forward_images}), train_set, tmp_path / "parts", parts
    )
    for name, tensor in tensors(several).items():
        torch.testing.assert_close(tensor, one[name], rtol=1e-3, atol=1e-4, msg=name)
    for images_seen, row in whole.rows.items():
        for name in row.keys() - {"train/images_per_s", "train/mfu", "train/data_wait_share"}:
            assert parts.rows[images_seen][name] == pytest.approx(row[name], rel=1e-3), name


def test_the_size_of_a_forward_pass_does_not_change_dropout(
    tiny: Config, train_set: DataSet, tmp_path: Path
) -> None:
    config = override(tiny, {"model.dropout": 0.3})
    one = fit(config, train_set, tmp_path / "a")
    assert_same(one, fit(override(config, {"train.forward_images": 8}), train_set, tmp_path / "b"))


def test_out_of_gpu_memory_is_a_one_line_error(
    tiny: Config, train_set: DataSet, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raise_out_of_memory(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Eps, "loss", raise_out_of_memory)
    with pytest.raises(UserError, match=r"a forward pass of 32 images .* --train\.forward-images"):
        fit(tiny, train_set, run_folder)


def test_the_loss_falls(tiny: Config, train_set: DataSet, run_folder: Path) -> None:
    tracker = RecordingTracker()
    config = override(tiny, {"train.total_images": 6400, "train.log_every_images": 640})
    config = override(config, {"train.sample_every_images": 0, "train.checkpoint_every_images": 0})
    fit(config, train_set, run_folder, tracker)
    losses = [row["train/loss"] for row in tracker.rows.values() if "train/loss" in row]
    assert losses[0] > 0.6  # a net with output 0 has eps-MSE 1
    assert losses[-1] < 0.35
    quarters = [tracker.rows[6400][f"train/loss_t_quarter_{i}"] for i in (1, 2, 3, 4)]
    assert quarters == sorted(
        quarters, reverse=True
    )  # the noisier the image, the easier to predict the noise


def test_what_is_written_at_each_interval(tiny: Config, train_set: DataSet, run_folder: Path) -> None:
    tracker = RecordingTracker()
    fit(tiny, train_set, run_folder, tracker)
    assert sorted(tracker.rows) == [64, 128, 192, 256]
    assert {
        "train/loss",
        "train/grad_norm",
        "train/lr",
        "train/images_per_s",
        "train/data_wait_share",
        "train/mfu",
    } <= set(tracker.rows[64])
    assert 0 < tracker.rows[64]["train/mfu"] < 1
    assert 0 <= tracker.rows[64]["train/data_wait_share"] <= 1
    assert "held_out/loss" in tracker.rows[128] and "held_out/loss" not in tracker.rows[64]
    assert not {"train/goodput", "train/workers", "data/corrupt_images"} & {*chain(*tracker.rows.values())}
    assert tracker.images == [
        *(("samples", 128), ("denoising", 128)),
        *(("samples_last", 0), ("samples", 256), ("denoising", 256)),
    ]
    assert tracker.files == {
        "samples.png",
        "pictures/forward_noising.png",
        "pictures/reverse_trajectory.png",
        "pictures/reverse_trajectory.gif",
    }
    names = sorted(path.name for path in run_folder.iterdir())
    assert names == [
        "best-000000000256",
        "checkpoint-000000000128",
        "checkpoint-000000000256",
        "pictures",
        "samples",
    ]


def test_sample_grids_are_at_multiples_of_their_interval_for_any_batch_size(
    tiny: Config, train_set: DataSet, run_folder: Path
) -> None:
    tracker = RecordingTracker()
    config = override(tiny, {"train.batch_size": 48, "train.sample_every_images": 100})
    assert fit(config, train_set, run_folder, tracker).images_seen == 288
    assert [at for key, at in tracker.images if key == "samples"] == [100, 200]
    assert [at for key, at in tracker.images if key == "samples_last"] == [0]


def test_held_out_bits_per_dim_is_logged_with_each_checkpoint(
    tiny: Config, train_set: DataSet, run_folder: Path
) -> None:
    """As in jobs/evaluate.py, but for a few images: the errors of x_0_hat are measured on the first eight."""
    tracker = RecordingTracker()
    fit(tiny, train_set, run_folder, tracker)
    assert [seen for seen, row in tracker.rows.items() if "held_out/bits_per_dim" in row] == [128, 256]
    net, config = checkpoint.load_net(run_folder / "checkpoint-000000000256", torch.device("cpu"))
    candidate = net, config, build_objective(config)
    held_out = read_held_out(train_set.held_out(), config)
    assert held_out is not None
    pilot, rest = (Images(held_out.image[part], held_out.label[part]) for part in (slice(8), slice(8, 40)))
    how: dict[str, Any] = {"variance": "measured", "device": torch.device("cpu")}
    how["measured"] = measure.measure(*candidate, pilot, **how)
    for num_draws, tolerance in ((4, 1e-4), (0, 0.2)):
        (whole, *_) = measure.bits_per_dim(*candidate, rest, start=8, num_draws=num_draws, **how).scores()
        assert tracker.rows[256]["held_out/bits_per_dim"] == pytest.approx(whole.value, abs=tolerance)
        assert tracker.rows[256]["held_out_error/bits_per_dim"] == pytest.approx(whole.error, abs=tolerance)


@pytest.mark.parametrize(
    "change",
    [{"objective.process": "uniform_mix"}, {"schedule.num_timesteps": 1}, {"train.held_out_images": 9}],
    ids=str,
)
def test_bits_per_dim_is_not_logged_without_a_bound_or_images(
    tiny: Config, train_set: DataSet, run_folder: Path, change: dict[str, Any]
) -> None:
    tracker = RecordingTracker()
    fit(override(tiny, change | {"sample.num_sample_steps": 1}), train_set, run_folder, tracker)
    assert "held_out/loss" in tracker.rows[256] and "held_out/bits_per_dim" not in tracker.rows[256]


def test_the_newest_checkpoints_and_the_best_are_kept(
    tiny: Config, train_set: DataSet, run_folder: Path
) -> None:
    config = override(tiny, {"train.checkpoint_every_images": 32, "train.keep_checkpoints": 2})
    state = fit(config, train_set, run_folder)
    assert sorted(p.name for p in run_folder.glob("checkpoint-*")) == [
        "checkpoint-000000000224",
        "checkpoint-000000000256",
    ]
    (best,) = run_folder.glob("best-*")
    assert checkpoint.read_state(best)["best_held_out_loss"] == state.best_held_out_loss


@pytest.mark.parametrize(
    "change",
    [
        {"objective.process": "uniform_mix"},
        {"objective.predict": "v", "objective.weight": "min_snr"},
        {"objective.predict": "x_0"},
        {"model.num_classes": 10, "sample.guidance_scale": 2.0},
        {"train.precision": "bfloat16"},
        {"sample.sampler": "ddpm"},
    ],
    ids=str,
)
def test_every_kind_of_run_trains_and_samples(
    tiny: Config, train_set: DataSet, run_folder: Path, change: dict[str, object]
) -> None:
    tracker = RecordingTracker()
    state = fit(override(tiny, change), train_set, run_folder, tracker)
    assert state.images_seen == 256
    assert np.isfinite([row["train/loss"] for row in tracker.rows.values()]).all()
    assert (run_folder / "samples/latest.png").exists()


def test_a_non_finite_gradient_stops_the_run(tiny: Config, train_set: DataSet, run_folder: Path) -> None:
    config = override(
        tiny, {"train.checkpoint_every_images": 32, "optim.lr": 1e36, "optim.lr_warmup_images": 0}
    )
    with pytest.raises(loop.NonFinite, match=r"step \d+ \(\d+ images\): the loss or the gradient is not"):
        fit(config, train_set, run_folder)
    for folder in run_folder.glob("checkpoint-*"):
        net, _ = checkpoint.load_net(folder, torch.device("cpu"), ema=False)
        assert all(torch.isfinite(weight).all() for weight in net.parameters())


@pytest.mark.parametrize("bad_step", [0, 3])
def test_a_skipped_step_changes_no_weight(
    tiny: Config, train_set: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad_step: int
) -> None:
    """The run continues, also when resumed from the checkpoint of that step, with unchanged weights."""
    config = override(
        tiny,
        {
            "optim.skip_non_finite": 1,
            "optim.lr_schedule": "constant",
            "optim.lr_warmup_images": 0,
            "train.checkpoint_every_images": 32,
            "train.total_images": 32 * (bad_step + 1),
        },
    )
    longer = override(config, {"train.total_images": 32 * 5})
    calls, loss = iter(range(100)), Eps.loss

    def loss_with_nan(self: Eps, model: torch.nn.Module, *args: Any) -> Loss:
        value = loss(self, model, *args)
        bad = model.training and next(calls) == bad_step
        return value._replace(value=value.value * float("nan")) if bad else value

    start = State.create(config, torch.device("cpu"))
    if bad_step:
        before = override(config, {"train.total_images": 32 * bad_step})
        start = fit(before, train_set, tmp_path / "before")
    monkeypatch.setattr(Eps, "loss", loss_with_nan)
    tracker = RecordingTracker()
    skipped = fit(config, train_set, tmp_path / "skipped", tracker)
    assert skipped.skipped_steps == tracker.rows[32 * (bad_step + 1)]["train/skipped_steps"] == 1
    for name, weight in skipped.net.state_dict().items():
        assert torch.equal(weight, start.net.state_dict()[name]), name
    for name, tensor in start.optimizer_tensors().items():
        assert torch.equal(tensor, skipped.optimizer_tensors()[name]), name

    resumed = fit(longer, train_set, tmp_path / "skipped")
    calls = iter(range(100))
    straight = fit(longer, train_set, tmp_path / "straight")
    assert resumed.skipped_steps == straight.skipped_steps == 1
    assert_same(resumed, straight)


def test_training_never_sees_held_out_images(tiny: Config, train_set: DataSet, run_folder: Path) -> None:
    held_out = train_set.held_out()
    assert held_out is not None
    hidden = {image.tobytes() for image in held_out.read(held_out.plan(0, 100), 0, 60).image}
    runtime = LocalRuntime(override(tiny, {"train.total_images": 1800}), train_set, held_out, run_folder)
    shown = {image.tobytes() for batch in runtime.batches(0) for image in batch.image}
    assert len(shown) == len({i.tobytes() for i in train_set.read(train_set.plan(0, 100), 0, 600).image})
    assert not shown & hidden


def test_batches_from_the_middle_equal_those_of_the_full_sequence(
    tiny: Config, train_set: DataSet, run_folder: Path
) -> None:
    runtime = LocalRuntime(tiny, train_set, None, run_folder)
    whole = list(runtime.batches(0))
    assert [batch.index for batch in whole[:5]] == [0, 1, 2, 3, 0]
    for a, b in itertools.zip_longest(whole[4 * 3 :], runtime.batches(3 * 32)):
        assert a.index == b.index and np.array_equal(a.image, b.image) and np.array_equal(a.label, b.label)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train.micro_batch_size": 5}, "not a positive multiple of micro_batch_size 5"),
        ({"train.forward_images": 12}, "forward_images is 12; it must be a multiple of micro_batch_size 8"),
        ({"train.forward_images": 0}, "forward_images is 0; it must be a multiple of micro_batch_size 8"),
        ({"schedule.beta_end": 2.0, "schedule.kind": "linear"}, "beta_end"),
        ({"model.norm_groups": 3}, "norm_groups"),
        ({"sample.sampler": "mix"}, "mix cannot undo the process gaussian"),
        ({"sample.num_sample_steps": 999}, "num_sample_steps"),
        ({"sample.guidance_interval": [3.0, 1.0]}, "guidance_interval"),
    ],
)
def test_invalid_configs_are_rejected_before_training(
    tiny: Config, change: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        loop.check(override(tiny, change))


@pytest.mark.slow
def test_a_conditional_run_samples_the_requested_digits(
    digits_uri: str, train_set: DataSet, run_folder: Path
) -> None:
    """A nearest-neighbour classifier fitted on the real digits recognizes them."""
    config = override(
        DIGITS, {"model.num_classes": 10, "train.total_images": 19_200, "optim.ema_decay": 0.98}
    )
    config = override(
        config, {"data.shards": digits_uri, "optim.lr_warmup_images": 1280, "train.held_out_images": 0}
    )
    config = override(config, {"train.sample_every_images": 0, "train.checkpoint_every_images": 0})
    state = fit(config, train_set, run_folder)
    config = override(config, {"sample.guidance_scale": 2.0, "sample.num_sample_steps": 25})
    objective = build_objective(config)
    requested = torch.arange(100) % 10
    drawn = generate.draw(
        state.ema.net, config, objective, range(100), device=torch.device("cpu"), label=requested
    ).numpy()
    classifier = KNeighborsClassifier(5).fit(*load_digits(return_X_y=True))
    seen = classifier.predict(drawn.reshape(100, 64) * (16 / 255))
    assert (seen == requested.numpy()).mean() >= 0.9
