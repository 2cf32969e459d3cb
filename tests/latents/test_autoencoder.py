"""Autoencoders of diffusers, from a folder: what is loaded, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from support.autoencoders import CHANNELS, FACTOR, SIZE, write_autoencoder

from ddpm.latents import autoencoder
from ddpm.latents.autoencoder import Shape
from ddpm.utils.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_autoencoder(tmp_path / "vae")


def test_an_autoencoder_is_loaded_saved_and_loaded_again(folder: Path, tmp_path: Path) -> None:
    loaded = autoencoder.load(f"diffusers:{folder}")
    assert autoencoder.shape_of(loaded) == Shape(CHANNELS, FACTOR)
    x = torch.linspace(-1, 1, 2 * 3 * SIZE * SIZE).reshape(2, 3, SIZE, SIZE)
    with torch.no_grad():
        z = loaded.encode(x)
        assert z.shape == (2, CHANNELS, SIZE // FACTOR, SIZE // FACTOR) and torch.equal(loaded.encode(x), z)
        copy = tmp_path / "copy"
        copy.mkdir()
        loaded.save(copy)
        again = autoencoder.load(f"diffusers:{copy}")
        assert torch.equal(again.encode(x), z) and torch.equal(again.decode(z), loaded.decode(z))
    assert again.digest == loaded.digest
    assert autoencoder.load(f"diffusers:{write_autoencoder(tmp_path / 'b', 1)}").digest != loaded.digest


def test_the_mean_of_the_latents_is_taken(folder: Path) -> None:
    from diffusers import AutoencoderKL

    x = torch.rand(1, 3, SIZE, SIZE)
    with torch.no_grad():
        right = AutoencoderKL.from_pretrained(folder, low_cpu_mem_usage=False).encode(x).latent_dist.mean
        torch.testing.assert_close(autoencoder.load(f"diffusers:{folder}").encode(x), right)


def test_tiny_and_dc_autoencoders(tmp_path: Path) -> None:
    from diffusers import AutoencoderDC, AutoencoderTiny

    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        latent_channels=3,
    )
    tiny.save_pretrained(tmp_path / "tiny")
    deep = AutoencoderDC(
        latent_channels=8,
        attention_head_dim=4,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(8, 8, 16),
        decoder_block_out_channels=(8, 8, 16),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()),
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
    )
    deep.save_pretrained(tmp_path / "deep")
    for name, shape in (("tiny", Shape(3, 2)), ("deep", Shape(8, 4))):
        loaded = autoencoder.load(f"diffusers:{tmp_path / name}")
        assert autoencoder.shape_of(loaded) == shape
        with torch.no_grad():
            assert loaded.decode(torch.zeros(1, shape.channels, 4, 4)).shape[2] == 4 * shape.factor


def test_what_is_no_autoencoder_is_one_line(folder: Path, tmp_path: Path) -> None:
    def error(name: str) -> str:
        with pytest.raises(UserError) as raised:
            autoencoder.load(name)
        assert "\n" not in str(raised.value)
        return str(raised.value)

    assert "KIND:WEIGHTS" in error("vae")
    assert "examples/taef2" in error("taef2:weights")
    assert "NAME@REVISION" in error("diffusers:somebody/vae")
    assert "config.json" in error(f"diffusers:{tmp_path}")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"_class_name": "UNet2DModel"}))
    assert "AutoencoderKL" in error(f"diffusers:{folder}")
    (folder / "config.json").write_text(json.dumps(config | {"latent_channels": 5}))
    assert "cannot be read" in error(f"diffusers:{folder}")
    (folder / "config.json").write_text(json.dumps(config))
    weights = folder / "diffusion_pytorch_model.safetensors"
    weights.rename(folder / "diffusion_pytorch_model.bin")
    assert "safetensors" in error(f"diffusers:{folder}")


def test_a_size_that_the_factor_does_not_divide_is_an_error() -> None:
    assert Shape(4, 8).side(128) == 16
    with pytest.raises(UserError, match="no multiple of it; use 96 or 104"):
        Shape(4, 8).side(100)
