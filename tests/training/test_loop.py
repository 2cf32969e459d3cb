"""Algorithm 1 end to end in one process: it learns, it resumes bit for bit, it stops on errors."""

import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from support.local import Logged, assert_same, fit, tensors
from torch import Tensor, nn

from ddpm.build import TrainedNet
from ddpm.config.json import override
from ddpm.config.presets import DIGITS, PRESETS
from ddpm.config.tree import Config
from ddpm.data.reading import DataSet
from ddpm.diffusion.objectives import Eps, Loss
from ddpm.evaluation import bits_per_dim
from ddpm.evaluation.bits_per_dim import bound_score
from ddpm.models import dropout, unet
from ddpm.models.dropout import Dropout
from ddpm.runs import checkpoint
from ddpm.runs import run_folder as runs
from ddpm.runs.storage import resolve
from ddpm.sampling import generate
from ddpm.training import loop
from ddpm.training.runtime import Runtime
from ddpm.training.state import State
from ddpm.utils.errors import UserError


@pytest.mark.parametrize(
    "choice",
    [
        {"model.dropout": 0.0},
        {"objective.variance": "learned"},
        {"optim.kind": "muon", "model.num_classes": 10, "data.augment": 0.3},
    ],
)
def test_an_interrupted_run_equals_an_uninterrupted_one_bit_for_bit(
    tiny: Config, train_set: DataSet, tmp_path: Path, choice: dict[str, object]
) -> None:
    config = override(tiny, {"model.dropout": 0.2, "data.horizontal_flip": True} | choice)
    straight = fit(config, train_set, tmp_path / "straight")

    class Interrupted(Exception):
        """Stands for the death of the process."""

    class KilledLater(Logged):
        def metrics(self, values: Mapping[str, float], images_seen: int) -> None:
            if images_seen > 128:
                raise Interrupted

    with pytest.raises(Interrupted):
        fit(config, train_set, tmp_path / "broken", KilledLater())
    resumed = fit(config, train_set, tmp_path / "broken")
    assert resumed.step == straight.step == 8
    assert_same(tensors(straight), tensors(resumed))


def test_training_depends_only_on_the_seeds(tiny: Config, train_set: DataSet, tmp_path: Path) -> None:
    first = fit(tiny, train_set, tmp_path / "a")
    torch.manual_seed(123)
    assert_same(tensors(first), tensors(fit(tiny, train_set, tmp_path / "b")))
    other = tensors(fit(override(tiny, {"train.seed": 1}), train_set, tmp_path / "c"))
    assert any(not torch.equal(tensor, other[name]) for name, tensor in tensors(first).items())


@pytest.mark.parametrize("forward_images", [3, 12])
def test_the_size_of_a_forward_pass_does_not_change_training(
    tiny: Config, train_set: DataSet, tmp_path: Path, forward_images: int
) -> None:
    """Images, flips, augmentation, noise, t, dropped labels and masks are equal: weights differ only by the order of
    summation."""
    changes = {"data.horizontal_flip": True, "data.augment": 0.3, "model.num_classes": 10}
    changes |= {"objective.variance": "learned"}
    config = override(tiny, {**changes, "model.dropout": 0.3})
    whole = Logged()
    parts = Logged()
    one = tensors(fit(config, train_set, tmp_path / "whole", whole))
    several = fit(
        override(config, {"train.forward_images": forward_images}), train_set, tmp_path / "parts", parts
    )
    for name, tensor in tensors(several).items():
        torch.testing.assert_close(tensor, one[name], rtol=1e-3, atol=1e-4, msg=name)
    for images_seen, row in whole.rows.items():
        for name in row.keys() - {"train/images_per_s", "train/data_wait_share"}:
            assert parts.rows[images_seen][name] == pytest.approx(row[name], rel=1e-3), name


def test_every_layer_image_and_step_has_a_mask_of_its_own(
    tiny: Config, train_set: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the size of a pass, and whatever torch's global generator draws."""
    keyed = dropout.keyed
    given = list[Tensor]()

    def recorded(layers: list[Dropout], keys: Tensor) -> AbstractContextManager[None]:
        given.append(keys)
        torch.rand(1)
        return keyed(layers, keys)

    monkeypatch.setattr(dropout, "keyed", recorded)
    config = override(tiny, {"model.dropout": 0.3, "train.total_images": 64})
    fit(config, train_set, tmp_path / "whole")
    whole = torch.cat(given, dim=1)
    fit(override(config, {"train.forward_images": 8}), train_set, tmp_path / "parts")
    parts = torch.cat(given[2:], dim=1)
    assert len(given) == 2 + 8 and torch.equal(whole, parts)
    assert whole.shape == (8, 64, 2) and whole.dtype == torch.int32
    assert len(whole.flatten(0, 1).unique(dim=0)) == 8 * 64
    assert whole.double().mean().abs() < 5 * 2**32 / (12 * whole.numel()) ** 0.5  # words of 32 bits, about 0
    fit(override(config, {"train.seed": 1}), train_set, tmp_path / "other")
    assert not (given[-1] == whole[:, 32:]).any()


@pytest.mark.parametrize(
    ("value", "device", "compiler", "wanted"),
    [
        *((True, "cpu", None, True), (False, "cuda", "gcc", False)),
        *((None, "cuda", "clang", True), (None, "cuda", None, False), (None, "cpu", "gcc", False)),
    ],
)
def test_when_a_net_is_compiled(
    monkeypatch: pytest.MonkeyPatch, value: bool | None, device: str, compiler: str | None, wanted: bool
) -> None:
    """The presets for GPUs leave it to the device."""
    monkeypatch.setattr(shutil, "which", lambda name: name if name == compiler else None)
    config = override(PRESETS["cifar10"], {} if value is None else {"train.compile": value})
    assert loop.compiles(config, torch.device(device)) is wanted


class OfTwo(Runtime):
    """One of two workers; the other's values are 1: it lacks bfloat16."""

    def mean(self, values: Tensor) -> Tensor:
        return (values + 1) / 2


@pytest.mark.parametrize(("runtime", "capability"), [(Runtime, "AVX2"), (OfTwo, "AVX512")])
def test_without_instructions_for_bfloat16_training_is_in_float32(
    tiny: Config,
    train_set: DataSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    runtime: type[Runtime],
    capability: str,
) -> None:
    monkeypatch.setattr("ddpm.models.precision.CPU_CAPABILITY", capability)
    states = []
    said = Logged()
    for precision in ("bfloat16", "float32"):
        changes = {"train.precision": precision, "optim.kind": "muon", "train.total_images": 64}
        states.append(fit(override(tiny, changes), train_set, tmp_path / precision, said, runtime))
    assert_same(*map(tensors, states))
    assert len(said.warnings) == 1 and "computes in float32" in said.warnings[0]


def test_the_blocks_are_compiled_before_the_first_step(
    tiny: Config, train_set: DataSet, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(loop, "compile_blocks", compiled.append)
    state = fit(override(tiny, {"train.compile": True, "train.total_images": 32}), train_set, run_folder)
    assert compiled == [state.net]


def test_out_of_gpu_memory_is_a_one_line_error(
    tiny: Config, train_set: DataSet, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raise_out_of_memory(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Eps, "loss", raise_out_of_memory)
    with pytest.raises(UserError, match=r"--train\.forward-images"):
        fit(tiny, train_set, run_folder)


def test_an_error_of_the_set_up_is_a_user_error(tiny: Config, train_set: DataSet, run_folder: Path) -> None:
    """A restart would meet it again; `loop.check` does not know it."""
    config = replace(tiny, optim=replace(tiny.optim, lr=-1.0))
    with pytest.raises(UserError, match="ValueError: Invalid learning rate"):
        fit(config, train_set, run_folder)


def test_a_net_with_a_dropout_of_torch_is_refused(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unet, "build", lambda *_, **__: nn.Sequential(nn.Dropout(0.1)))
    with pytest.raises(UserError, match=r"0 is an nn\.Dropout"):
        loop.check(tiny)


def test_the_loss_falls(tiny: Config, train_set: DataSet, run_folder: Path) -> None:
    logged = Logged()
    changes = {"total_images": 6400, "log_every_images": 640, "sample_every_images": 0}
    changes |= {"checkpoint_every_images": 0}
    fit(override(tiny, {f"train.{name}": v for name, v in changes.items()}), train_set, run_folder, logged)
    losses = [row["train/loss"] for row in logged.rows.values() if "train/loss" in row]
    assert losses[0] > 0.6  # a net with output 0 has eps-MSE 1
    assert losses[-1] < 0.35
    quarters = [logged.rows[6400][f"train/loss_t_quarter_{i}"] for i in (1, 2, 3, 4)]
    assert quarters == sorted(
        quarters, reverse=True
    )  # the noisier the image, the easier to predict the noise


def test_what_is_written_at_each_interval(tiny: Config, train_set: DataSet, run_folder: Path) -> None:
    logged = Logged()
    fit(tiny, train_set, run_folder, logged)
    assert sorted(logged.rows) == [64, 128, 192, 256]
    names = ("loss", "grad_norm", "lr", "images_per_s", "data_wait_share")
    assert {f"train/{name}" for name in names} <= set(logged.rows[64])
    assert 0 <= logged.rows[64]["train/data_wait_share"] <= 1
    assert "held_out/loss" in logged.rows[128] and "held_out/loss" not in logged.rows[64]
    assert not {"train/goodput", "train/workers"} & {*chain(*logged.rows.values())}
    run = resolve(str(run_folder))
    for series in (runs.SAMPLES, runs.DENOISING):
        assert list(runs.pictures(run, series)) == [128, 256]
    pictures = {"forward_noising.png", "reverse_trajectory.png", "reverse_trajectory.gif"}
    assert {path.name for path in (run_folder / "pictures").iterdir()} == pictures
    stored = {"best-000000000256-g1", "checkpoint-000000000128-g1", "checkpoint-000000000256-g1"}
    folders = {"pictures", "samples", "denoising"}
    assert {path.name for path in run_folder.iterdir()} == stored | folders | {
        "status.json",
        "generations.json",
    }


def test_sample_grids_are_at_multiples_of_their_interval_for_any_batch_size(
    tiny: Config, train_set: DataSet, run_folder: Path
) -> None:
    """The last grid, between two multiples, is at its own position."""
    config = override(tiny, {"train.batch_size": 48, "train.sample_every_images": 100})
    assert fit(config, train_set, run_folder).images_seen == 288
    run = resolve(str(run_folder))
    assert list(runs.pictures(run, runs.SAMPLES)) == [100, 200, 288]
    assert list(runs.pictures(run, runs.DENOISING)) == [100, 200]


def test_held_out_bits_per_dim_is_logged_with_each_checkpoint(
    tiny: Config, train_set: DataSet, run_folder: Path
) -> None:
    """As in jobs/evaluate.py, but for a few images: the errors of x_0_hat are measured on the first eight."""
    tracker = Logged()
    fit(tiny, train_set, run_folder, tracker)
    assert [seen for seen, row in tracker.rows.items() if "held_out/bits_per_dim" in row] == [128, 256]
    trained = checkpoint.load_net(run_folder / "checkpoint-000000000256-g1")
    held_out = Runtime(trained.config, train_set, train_set.held_out(), None).held_out()
    assert held_out is not None
    measured = bits_per_dim.measure_errors(trained, held_out[:8])
    for num_draws, tolerance in ((4, 1e-4), (0, 0.2)):
        whole = bound_score(bits_per_dim.bound_terms(trained, measured, held_out[8:40], 8, num_draws))
        assert tracker.rows[256]["held_out/bits_per_dim"] == pytest.approx(whole.value, abs=tolerance)
        assert tracker.rows[256]["held_out_error/bits_per_dim"] == pytest.approx(whole.error, abs=tolerance)


@pytest.mark.parametrize(
    "change",
    [
        {"objective.process": "uniform_mix"},
        {"schedule.num_timesteps": 1},
        {"train.held_out_images": 9},
    ],
    ids=str,
)
def test_bits_per_dim_is_not_logged_without_a_bound_or_images(
    tiny: Config, train_set: DataSet, run_folder: Path, change: dict[str, Any]
) -> None:
    tracker = Logged()
    fit(override(tiny, change | {"sample.num_sample_steps": 1}), train_set, run_folder, tracker)
    assert "held_out/loss" in tracker.rows[256] and "held_out/bits_per_dim" not in tracker.rows[256]


@pytest.mark.parametrize(("augment", "helps"), [(0.0, " or --data.augment 0.12 help"), (0.1, " help")])
def test_a_held_out_loss_that_has_risen_is_said_once(
    tiny: Config,
    train_set: DataSet,
    run_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    augment: float,
    helps: str,
) -> None:
    losses = iter([0.6, 0.5, 0.505, 0.495, 0.5, 0.51, 0.6, 0.7])  # a little above the lowest is not a turn
    monkeypatch.setattr("ddpm.training.held_out.mean_loss", lambda *args: next(losses))
    logged = Logged()
    changes = {"train.checkpoint_every_images": 32, "train.sample_every_images": 0, "data.augment": augment}
    fit(override(tiny, changes), train_set, run_folder, logged)
    (line,) = logged.warnings
    assert (
        line.startswith("the held-out loss has risen to 0.5100 from 0.4950: ") and f"images{helps}." in line
    )
    (best,) = run_folder.glob(line.split()[-1])
    assert checkpoint.read_state(best)["images_seen"] == 128


def test_the_newest_checkpoints_and_the_best_are_kept(
    tiny: Config, train_set: DataSet, run_folder: Path
) -> None:
    config = override(tiny, {"train.checkpoint_every_images": 32, "train.keep_checkpoints": 2})
    state = fit(config, train_set, run_folder)
    kept = sorted(path.name for path in run_folder.glob("checkpoint-*"))
    assert kept == ["checkpoint-000000000224-g1", "checkpoint-000000000256-g1"]
    (best,) = run_folder.glob("best-*")
    assert checkpoint.read_state(best)["best_held_out_loss"] == state.best_held_out_loss


@pytest.mark.parametrize(
    "change",
    [
        {"objective.process": "uniform_mix"},
        {"objective.predict": "v", "objective.weight": "min_snr"},
        {"objective.predict": "x_0"},
        {"objective.predict": "edm", "objective.timesteps": "log_normal", "schedule.kind": "geometric"},
        {"objective.predict": "flow", "objective.timesteps": "logit_normal", "schedule.kind": "straight"},
        {"model.num_classes": 10, "sample.guidance_scale": 2.0},
        {"train.precision": "bfloat16"},
        {"sample.sampler": "ddpm"},
    ],
    ids=str,
)
def test_every_kind_of_run_trains_and_samples(
    tiny: Config, train_set: DataSet, run_folder: Path, change: dict[str, object]
) -> None:
    tracker = Logged()
    state = fit(override(tiny, change), train_set, run_folder, tracker)
    assert state.images_seen == 256
    assert np.isfinite([row["train/loss"] for row in tracker.rows.values()]).all()
    assert (run_folder / "samples/latest.png").exists()


def test_a_non_finite_gradient_stops_the_run(tiny: Config, train_set: DataSet, run_folder: Path) -> None:
    changes = {"train.checkpoint_every_images": 32, "optim.lr": 1e36, "optim.lr_warmup_images": 0}
    config = override(tiny, changes)
    with pytest.raises(loop.NonFinite, match=r"step \d+ \(\d+ images\)"):
        fit(config, train_set, run_folder)
    for folder in run_folder.glob("checkpoint-*"):
        net = checkpoint.load_net(folder, ema=False).net
        assert all(torch.isfinite(weight).all() for weight in net.parameters())


@pytest.mark.parametrize(("bad_step", "kind"), [(0, "adamw"), (3, "muon")])
def test_a_skipped_step_changes_no_weight(
    tiny: Config,
    train_set: DataSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bad_step: int,
    kind: str,
) -> None:
    """The run continues, also when resumed from the checkpoint of that step, with unchanged weights."""
    changes = {"optim.skip_non_finite": 1, "optim.lr_schedule": "constant", "optim.lr_warmup_images": 0}
    changes |= {"optim.kind": kind}  # type: ignore[dict-item]
    changes |= {"train.checkpoint_every_images": 32, "train.total_images": 32 * (bad_step + 1)}
    config = override(tiny, changes)
    longer = override(config, {"train.total_images": 32 * 5})
    calls = iter(range(100))
    loss = Eps.loss

    def loss_with_nan(self: Eps, model: torch.nn.Module, *args: Any) -> Loss:
        value = loss(self, model, *args)
        bad = model.training and next(calls) == bad_step
        return value._replace(value=value.value * float("nan")) if bad else value

    start = State.create(config, torch.device("cpu"))
    if bad_step:
        before = override(config, {"train.total_images": 32 * bad_step})
        start = fit(before, train_set, tmp_path / "before")
    monkeypatch.setattr(Eps, "loss", loss_with_nan)
    tracker = Logged()
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
    assert_same(tensors(resumed), tensors(straight))


def test_training_never_sees_held_out_images(tiny: Config, train_set: DataSet, run_folder: Path) -> None:
    held_out = train_set.held_out()
    assert held_out is not None
    hidden = {image.tobytes() for image in held_out.read(held_out.plan(0, 100), 0, 60).image}
    runtime = Runtime(override(tiny, {"train.total_images": 1800}), train_set, held_out, None)
    shown = {image.tobytes() for batch in runtime.batches(0) for image in batch.image}
    assert len(shown) == len({i.tobytes() for i in train_set.read(train_set.plan(0, 100), 0, 600).image})
    assert not shown & hidden


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train.micro_batch_size": 5}, "micro_batch_size 5"),
        ({"train.forward_images": 0}, "forward_images is 0"),
        ({"schedule.beta_end": 2.0, "schedule.kind": "linear"}, "beta_end"),
        ({"model.norm_groups": 3}, "norm_groups"),
        ({"sample.sampler": "mix"}, "sampler mix"),
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
    changes = {"model.num_classes": 10, "train.total_images": 19_200, "optim.ema_decay": 0.98}
    changes |= {"data.shards": digits_uri, "optim.lr_warmup_images": 1280, "train.held_out_images": 0}
    changes |= {"train.sample_every_images": 0, "train.checkpoint_every_images": 0}
    config = override(DIGITS, changes)
    state = fit(config, train_set, run_folder)
    config = override(config, {"sample.guidance_scale": 2.0, "sample.num_sample_steps": 25})
    drawn = generate.draw(TrainedNet(state.ema.net, config), range(100)).numpy()  # image i has class i mod 10
    classifier = KNeighborsClassifier(5).fit(*load_digits(return_X_y=True))
    seen = classifier.predict(drawn.reshape(100, 64) * (16 / 255))
    assert (seen == np.arange(100) % 10).mean() >= 0.9
