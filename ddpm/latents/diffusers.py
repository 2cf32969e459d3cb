"""The autoencoders of the package diffusers: a folder, or a name and revision on Hugging Face's hub.

Only their configuration (JSON) and weights (safetensors) are read, into a class of the list below: no code comes from
the hub.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm.utils.digests import digest_of
from ddpm.utils.errors import UserError

CLASSES = ("AutoencoderKL", "AutoencoderTiny", "AutoencoderDC")
WEIGHTS = "diffusion_pytorch_model.safetensors"
CONFIG = "config.json"
FILES = (CONFIG, "*.safetensors", "*.safetensors.index.json")
"""What is downloaded from the hub."""


class DiffusersAutoencoder:
    """An autoencoder of diffusers, in float32.

    Args:
        net: an instance of one of CLASSES.
    """

    def __init__(self, net: Any) -> None:
        self._net = net.eval().requires_grad_(False)
        config = {key: value for key, value in net.config.items() if not key.startswith("_")}
        recipe = json.dumps([self.class_name, config], sort_keys=True, default=list)
        self.digest = digest_of(net.state_dict(), recipe)

    @property
    def class_name(self) -> str:
        """One of CLASSES."""
        return type(self._net).__name__

    def encode(self, x: Tensor) -> Tensor:
        encoded = self._net.encode(x)
        if hasattr(encoded, "latent_dist"):
            z: Tensor = encoded.latent_dist.mode()
        elif hasattr(encoded, "latents"):
            z = encoded.latents
        else:
            z = encoded.latent
        return z

    def decode(self, z: Tensor) -> Tensor:
        x: Tensor = self._net.decode(z).sample
        return x

    def save(self, folder: Path) -> None:
        self._net.save_pretrained(folder, safe_serialization=True)

    def to(self, device: torch.device) -> "DiffusersAutoencoder":
        self._net.to(device)
        return self


def load(weights: str) -> DiffusersAutoencoder:
    """The autoencoder in the folder `weights`, or the one called NAME@REVISION on the hub."""
    try:
        import diffusers
    except ImportError:
        raise UserError("diffusers is not installed; run pip install 'ddpm-on-ray[latents]'") from None
    diffusers.utils.logging.set_verbosity_error()
    folder = Path(weights)
    if not folder.is_dir():
        folder = _downloaded(weights)
    name = _class_name(folder)
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{folder} has no weights in a file *.safetensors; other files of weights are not read"
        )
    try:
        net = getattr(diffusers, name).from_pretrained(
            folder,
            use_safetensors=True,
            local_files_only=True,
            low_cpu_mem_usage=False,  # else it warns that accelerate is missing
            torch_dtype=torch.float32,
        )
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        line = " ".join(str(error).split())[:300]
        raise UserError(f"{folder} cannot be read as an {name} of diffusers: {line}") from None
    return DiffusersAutoencoder(net)


def _class_name(folder: Path) -> str:
    """The class that config.json names, one of CLASSES."""
    file = folder / CONFIG
    try:
        name = json.loads(file.read_bytes())["_class_name"]
    except FileNotFoundError:
        raise UserError(f"{folder} is not the folder of an autoencoder: it has no {CONFIG}") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{file} cannot be read: {type(error).__name__}: {error}") from None
    if name not in CLASSES:
        raise UserError(f"{file} is of the class {name!r:.80}; it must be one of {', '.join(CLASSES)}")
    return str(name)


def _downloaded(weights: str) -> Path:
    """The folder of NAME@REVISION in Hugging Face's cache, downloaded if need be."""
    name, at, revision = weights.partition("@")
    if not at or not revision:
        raise UserError(
            f"{weights} is no folder on this machine; on Hugging Face's hub it must be NAME@REVISION, the revision a "
            "commit, so that the weights are always the same"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        line = " ".join(str(error).split())[:200]
        raise UserError(f"{weights} cannot be downloaded from Hugging Face's hub: {line}") from None
