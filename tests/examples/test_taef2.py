"""The autoencoder of examples/taef2, with random weights; where they are, with the real ones, too."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support import examples
from support.processes import REPO

from ddpm.latents import autoencoder
from ddpm.latents.autoencoder import Shape
from ddpm.utils.errors import UserError

taef2 = examples.load("taef2", "ddpm_taef2")
REAL = REPO.parent / "shared/data/taef2"


def write_weights(folder: Path) -> Path:
    folder.mkdir()
    for name, net in (("encoder", taef2.encoder()), ("decoder", taef2.decoder())):
        save_file(net.state_dict(), folder / f"{name}.safetensors")
    return folder


@pytest.mark.parametrize("weights", ["random", *(["real"] if REAL.is_dir() else [])])
def test_it_is_an_autoencoder(on_path: Callable[[str], None], tmp_path: Path, weights: str) -> None:
    on_path("taef2")
    loaded = autoencoder.load(f"taef2:{write_weights(tmp_path / 'w') if weights == 'random' else REAL}")
    assert autoencoder.shape_of(loaded) == Shape(32, 8)
    loaded.save(tmp_path)
    again = autoencoder.load(f"taef2:{tmp_path}")
    x = torch.linspace(-1, 1, 64).expand(1, 3, 64, 64)
    with torch.no_grad():
        z = loaded.encode(x)
        restored = loaded.decode(z)
        assert torch.equal(again.decode(again.encode(x)), restored)
    assert again.digest == loaded.digest
    if weights == "real":
        assert (restored - x).square().mean() < 0.01


def test_other_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"encoder\.safetensors cannot be read"):
        taef2.load(str(tmp_path))
    folder = write_weights(tmp_path / "w")
    save_file({"0.weight": torch.zeros(1)}, folder / "decoder.safetensors")
    with pytest.raises(UserError, match="other weights"):
        taef2.load(str(folder))
