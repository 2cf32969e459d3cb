"""An export to diffusers computes the same, and importing it restores the net."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support import processes
from support.autoencoders import CHANNELS, write_autoencoder
from support.tiny import TINY_NET
from torch import Tensor

from ddpm.build import TrainedNet, build_net, build_sampler, build_schedule, resolve_sample
from ddpm.config.json import override
from ddpm.config.presets import CIFAR10
from ddpm.config.tree import Config
from ddpm.diffusion.samplers import PerImageNoise
from ddpm.export import diffusers_config, export
from ddpm.latents.autoencoder import Autoencoder
from ddpm.latents.diffusers import load as load_autoencoder
from ddpm.latents.scaling import Decoder, Scaling
from ddpm.runs import checkpoint
from ddpm.training.state import State
from ddpm.utils.errors import UserError
from ddpm.utils.generators import TorchGenerator
from ddpm.utils.seeding import torch_seed

diffusers = pytest.importorskip("diffusers")

CPU = torch.device("cpu")
SEEDS = [3, 1, 4]
TINY = override(TINY_NET, {"sample.sampler": "ddpm"})
GOOGLE_UNET = {
    "act_fn": "silu",
    "attention_head_dim": None,
    "block_out_channels": [128, 256, 256, 256],
    "center_input_sample": False,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-6,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 32,
    "time_embedding_type": "positional",
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}
"""google/ddpm-cifar10-32, unet/config.json, as published."""
# The settings of diffusers that each of them needs, and that they are used.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "eps, linear": ({}, {"beta_schedule": "linear"}),
    "eps, scaled linear, Algorithm 2 to the letter": (
        {"schedule.kind": "scaled_linear", "sample.mean": "plain", "sample.variance": "beta"},
        {"beta_schedule": "scaled_linear", "clip_sample": False, "variance_type": "fixed_large"},
    ),
    "v, cosine": (
        {"schedule.kind": "cosine", "objective.predict": "v", "data.augment": 0.1},
        {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction", "trained_betas": None},
    ),
    "x_0, a cosine of its own": (
        {"schedule.kind": "cosine", "schedule.cosine_s": 0.02, "objective.predict": "x_0"},
        {"prediction_type": "sample"},
    ),
    "a learned variance": (
        {"schedule.kind": "cosine", "objective.variance": "learned", "model.channels": 3},
        {"variance_type": "learned_range"},
    ),
    "eps, sigmoid": ({"schedule.kind": "sigmoid"}, {}),
    "bfloat16, colour, heads, no attention in the middle": (
        {
            "train.precision": "bfloat16",
            "model.channels": 3,
            "model.attention_head_dim": 4,
            "model.middle_attention": False,
        },
        {},
    ),
}


def make_net(config: Config) -> TrainedNet:
    """A net in float32 whose output depends on all weights; under autocast outputs would not be equal."""
    net = build_net(replace(config, train=replace(config.train, precision="float32")))
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in net.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return TrainedNet(net.eval().requires_grad_(False), config)


def our_images(trained: TrainedNet, label: int | None = None) -> Tensor:
    """[B, C, H, W] in [0, 1], of a net of images."""
    return (our_x_0(trained, label) / 2 + 0.5).clamp(0, 1)


def our_x_0(trained: TrainedNet, label: int | None = None) -> Tensor:
    """[B, C, H, W], as the sampler that `config` describes draws them."""
    net = trained.net
    config = trained.config
    objective = trained.objective
    labels = None if label is None else torch.full((len(SEEDS),), label)
    generators = [TorchGenerator(seed, device=torch.device("cpu")) for seed in SEEDS]
    noise = PerImageNoise(generators, (config.model.channels, 8, 8))
    return build_sampler(config)(lambda x_t, t: objective.denoise(net, x_t, t, labels), noise)


def their_images(folder: Path, num_inference_steps: int) -> Tensor:
    pipeline = diffusers.DDPMPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(torch_seed(seed)) for seed in SEEDS]
    images = pipeline(
        len(SEEDS), generators, num_inference_steps=num_inference_steps, output_type="np"
    ).images
    return torch.from_numpy(images).permute(0, 3, 1, 2)


@pytest.mark.parametrize("name", CASES)
def test_the_exported_pipeline_samples_our_images_from_our_noise(name: str, tmp_path: Path) -> None:
    changes, words = CASES[name]
    config = override(TINY, {"schedule.num_timesteps": 25, **changes})
    trained = make_net(config)
    export.to_diffusers(trained, tmp_path / "out")

    unet = diffusers.UNet2DModel.from_pretrained(tmp_path / "out", subfolder="unet")
    x_t = torch.randn(4, config.model.channels, 8, 8)
    t = torch.tensor([0, 1, 7, config.schedule.num_timesteps - 1])
    predicted = trained.net(x_t, t)
    assert predicted.std() > 0.1
    assert (unet(x_t, t).sample - predicted).abs().max() < 1e-5

    ours = our_images(trained)
    theirs = their_images(tmp_path / "out", config.schedule.num_timesteps)
    assert ours.std() > 0.1
    assert (ours[0] - ours[1]).abs().max() > 0.1
    assert (ours - theirs).abs().max() < 1e-3
    scheduler_config = json.loads((tmp_path / "out/scheduler/scheduler_config.json").read_text())
    assert {key: scheduler_config[key] for key in words} == words
    assert not list(tmp_path.glob("out/**/*.bin")), "no pickle"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_with_a_thousand_timesteps_the_embedding_is_that_of_diffusers(tmp_path: Path) -> None:
    trained = make_net(TINY)
    export.to_diffusers(trained, tmp_path / "out")
    unet = diffusers.UNet2DModel.from_pretrained(tmp_path / "out", subfolder="unet")
    assert unet.config.time_embedding_type == "positional"
    x_t = torch.randn(4, 1, 8, 8)
    t = torch.tensor([0, 1, 500, 999])
    assert (unet(x_t, t).sample - trained.net(x_t, t)).abs().max() < 1e-5
    # With fewer steps diffusers uses the timesteps of our ddim, which is ancestral for eta = 1.
    few = override(TINY, {"sample.sampler": "ddim", "sample.eta": 1.0, "sample.num_sample_steps": 8})
    assert (our_images(TrainedNet(trained.net, few)) - their_images(tmp_path / "out", 8)).abs().max() < 1e-3


@pytest.mark.parametrize("label", [1, 3])
def test_a_conditional_net_is_exported_for_one_class(label: int, tmp_path: Path) -> None:
    config = override(TINY, {"schedule.num_timesteps": 20, "model.num_classes": 3})
    trained = make_net(config)
    with pytest.raises(UserError, match=r"label is None"):
        export.to_diffusers(trained, tmp_path / "out")
    with pytest.raises(UserError, match=r"label is 4;"):
        export.to_diffusers(trained, tmp_path / "out", label=4)
    export.to_diffusers(trained, tmp_path / "out", label)
    theirs = their_images(tmp_path / "out", 20)
    assert (our_images(trained, label) - theirs).abs().max() < 1e-3
    assert (our_images(trained, 0) - theirs).abs().max() > 1e-2
    assert trained.net.label_embedding.weight.shape == (4, 32), "the net itself is left as it was"


def latents_net(autoencoder: Autoencoder) -> TrainedNet:
    """A net of the autoencoder's latents, with three classes."""
    changes = {"schedule.num_timesteps": 20, "model.channels": CHANNELS, "model.num_classes": 3}
    of_latents = {"data.latents": autoencoder.digest, "data.x_0_max": 1.5}
    scaling = Scaling(mean=(0.1, -0.2, 0.3, 0.0), std=(0.5, 0.7, 0.9, 1.1), limit=3.0)
    trained = make_net(override(TINY, changes | of_latents))
    return replace(trained, decoder=Decoder(autoencoder, scaling))


def test_a_net_of_latents_is_exported_with_a_script(tmp_path: Path) -> None:
    trained = latents_net(load_autoencoder(str(write_autoencoder(tmp_path / "vae"))))
    export.to_diffusers(trained, tmp_path / "out", label=1)
    seeds = [torch_seed(seed) for seed in SEEDS]
    done = processes.run([sys.executable, tmp_path / "out/sample.py", *seeds], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    theirs = np.stack([np.asarray(Image.open(tmp_path / f"{seed}.png")) for seed in seeds]).astype(int)
    ours = trained.images(our_x_0(trained, 1)).numpy()
    assert ours.std() > 20
    assert np.abs(ours - theirs).max() <= 1
    assert np.abs(trained.images(our_x_0(trained, 0)).numpy() - theirs).max() > 1
    scheduler_config = json.loads((tmp_path / "out" / SCHEDULER).read_text())
    assert scheduler_config["clip_sample_range"] == 1.5


def test_an_autoencoder_that_diffusers_does_not_have_is_refused(tmp_path: Path) -> None:
    class Other:
        """An autoencoder of another package."""

        digest = "other"

    trained = latents_net(cast(Autoencoder, Other()))
    with pytest.raises(UserError, match="no class of diffusers"):
        export.to_diffusers(trained, tmp_path / "out", label=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"schedule.num_timesteps": 20, "schedule.kind": "cosine", "objective.predict": "v"},
        {"sample.mean": "plain", "sample.variance": "beta", "model.attention_head_dim": 4},
        {"objective.variance": "learned", "objective.predict": "v"},
    ],
    ids=str,
)
@pytest.mark.lowest
def test_export_and_import_is_a_round_trip(changes: dict[str, Any], tmp_path: Path) -> None:
    config = override(TINY, changes)
    trained = make_net(config)
    export.to_diffusers(trained, tmp_path / "pipeline")
    export.from_diffusers(tmp_path / "pipeline", tmp_path / "back")
    for ema in (True, False):
        back = checkpoint.load_net(tmp_path / "back", ema=ema)
        before = trained.net.state_dict()
        after = back.net.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
    known = back.config
    assert (known.model, known.schedule, known.objective) == (config.model, config.schedule, config.objective)
    left = resolve_sample(config.sample, config.objective)
    assert (known.sample.mean, known.sample.variance) == (left.mean, left.variance)
    build_sampler(known)
    state = State.create(known, CPU)
    state.restore(tmp_path / "back", known)
    assert (state.step, state.images_seen) == (0, 0)
    assert checkpoint.read_state(tmp_path / "back")["imported_from"] == str(tmp_path / "pipeline")


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A small pipeline folder like google/ddpm-cifar10-32: settings that are missing there have diffusers' defaults."""
    unet = GOOGLE_UNET | {
        "_class_name": "UNet2DModel",
        "block_out_channels": [8, 16],
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "norm_num_groups": 4,
        "sample_size": 8,
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    }
    scheduler = {
        "_class_name": "DDPMScheduler",
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "beta_start": 0.0001,
        "clip_sample": True,
        "num_train_timesteps": 1000,
        "trained_betas": None,
        "variance_type": "fixed_large",
    }
    torch.manual_seed(0)
    made = diffusers.UNet2DModel.from_config(unet)
    made.save_pretrained(tmp_path / "published/unet")
    (tmp_path / "published/unet/config.json").write_text(json.dumps(unet))
    (tmp_path / "published/scheduler").mkdir()
    (tmp_path / "published/scheduler/scheduler_config.json").write_text(json.dumps(scheduler))
    return tmp_path / "published"


def test_a_published_pipeline_becomes_a_checkpoint(published: Path, tmp_path: Path) -> None:
    export.from_diffusers(published, tmp_path / "checkpoint")
    trained = checkpoint.load_net(tmp_path / "checkpoint")
    config = trained.config
    assert (config.model.width_multipliers, config.model.attention_resolutions) == ((1, 2), (4,))
    assert (config.sample.mean, config.sample.variance) == ("clipped", "beta")
    assert torch.allclose(build_schedule(config.schedule).beta[[0, -1]], torch.tensor([1e-4, 0.02]).double())
    theirs = diffusers.UNet2DModel.from_pretrained(published, subfolder="unet")
    x_t = torch.randn(3, 3, 8, 8)
    t = torch.tensor([0, 400, 999])
    assert (trained.net(x_t, t) - theirs(x_t, t).sample).abs().max() < 1e-5


def test_the_cifar10_preset_has_the_architecture_of_google_s() -> None:
    ours = diffusers_config.defaults(diffusers.UNet2DModel) | diffusers_config.unet_config(CIFAR10)
    assert {key: ours[key] for key in GOOGLE_UNET} == GOOGLE_UNET


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


UNET = "unet/config.json"
SCHEDULER = "scheduler/scheduler_config.json"


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        (UNET, {"freq_shift": 0}, "/unet: freq_shift is 0"),
        (UNET, {"sample_size": [8, 16]}, r"sample_size is \[8, 16\]"),
        (UNET, {"up_block_types": ["UpBlock2D", "AttnUpBlock2D"]}, "up_block_types is"),
        (UNET, {"in_channels": 6}, "out_channels is 3"),
        (UNET, {"in_channels": 1, "out_channels": 1}, "cannot be read as a DDPMPipeline: .*conv_in"),
        (UNET, {"mid_block_scale_factor": 2}, "mid_block_scale_factor is 2"),
        (UNET, {"layers_per_block": 3}, "cannot be read as a DDPMPipeline: .*size mismatch"),
        (UNET, {"block_out_channels": [8]}, "/unet: down_block_types is"),
        (SCHEDULER, {"num_train_timesteps": 500}, "/unet: time_embedding_type is 'positional'"),
        (SCHEDULER, {"trained_betas": [0.1] * 1000}, "/scheduler: trained_betas is"),
        (SCHEDULER, {"beta_schedule": "sigmoid"}, "beta_schedule is 'sigmoid'"),
        (SCHEDULER, {"variance_type": "learned_range"}, "out_channels is 3"),
        (SCHEDULER, {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr is True"),
        (SCHEDULER, {"thresholding": True}, "/scheduler: thresholding is True"),
        (SCHEDULER, {"beta_start": "low"}, "beta_start is 'low'"),
    ],
)
def test_another_architecture_is_a_one_line_error(
    published: Path, tmp_path: Path, file: str, changes: dict[str, Any], message: str
) -> None:
    edit(published / file, **changes)
    with pytest.raises(UserError, match=message) as caught:
        export.from_diffusers(published, tmp_path / "checkpoint")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "checkpoint").exists()


def test_missing_or_extra_weights_are_rejected(published: Path, tmp_path: Path) -> None:
    path = published / "unet/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    bias = weights.pop("conv_out.bias")
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(UserError, match=r"missing_keys conv_out\.bias"):
        export.from_diffusers(published, tmp_path / "checkpoint")
    save_file(weights | {"conv_out.bias": bias, "more": bias + 1}, path, {"format": "pt"})
    with pytest.raises(UserError, match="unexpected_keys more"):
        export.from_diffusers(published, tmp_path / "checkpoint")


def test_a_learned_timestep_embedding_is_rejected(tmp_path: Path) -> None:
    config = override(TINY, {"schedule.num_timesteps": 20})
    export.to_diffusers(make_net(config), tmp_path / "pipeline")
    unet = diffusers.UNet2DModel.from_pretrained(tmp_path / "pipeline", subfolder="unet")
    with torch.no_grad():
        unet.time_proj.weight += 0.1
    unet.save_pretrained(tmp_path / "pipeline/unet")
    with pytest.raises(UserError, match="its embedding of t was learned"):
        export.from_diffusers(tmp_path / "pipeline", tmp_path / "checkpoint")


def test_pickled_weights_are_not_loaded(published: Path, tmp_path: Path) -> None:
    class TouchOnUnpickle:
        def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
            return (Path.cwd().joinpath("sprung").touch, ())

    (published / "unet/diffusion_pytorch_model.safetensors").unlink()
    torch.save(TouchOnUnpickle(), published / "unet/diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be read as a DDPMPipeline"):
        export.from_diffusers(published, tmp_path / "checkpoint")
    assert not Path("sprung").exists()
    with pytest.raises(UserError, match=r"unet/config\.json"):
        export.from_diffusers(tmp_path / "none", tmp_path / "checkpoint")


def test_an_export_overwrites_nothing_and_leaves_nothing_incomplete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    trained = make_net(TINY)
    with pytest.raises(UserError, match="out exists, and nothing is overwritten"):
        export.to_diffusers(trained, tmp_path / "out")

    def fails(*args: Any, **settings: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(diffusers.DDPMPipeline, "save_pretrained", fails)
    with pytest.raises(UserError, match=r"cannot write .*new: No space left"):
        export.to_diffusers(trained, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"objective.process": "uniform_mix", "sample.sampler": "mix"},
            "objective.process uniform_mix",
        ),
        (
            {"objective.predict": "edm"},
            "objective.predict is edm.*examples/torch_export",
        ),
        ({"objective.predict": "flow"}, "objective.predict is flow"),
    ],
)
def test_other_nets_cannot_be_exported_to_diffusers(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        export.to_diffusers(make_net(override(TINY, changes)), tmp_path / "out")
    assert not (tmp_path / "out").exists()
