"""A cache of expensive tensors in a folder or a bucket: trained feature nets, and features of real images.

Files are safetensors; a damaged file is computed again.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ddpm.evaluation.features import digest_of
from ddpm.storage.locations import Location
from ddpm.utils.errors import UserError

CHECKSUM = "sha256"
"""Name of the tensor that holds the digest of the others."""


@dataclass(frozen=True)
class Cache:
    """A folder of safetensors files."""

    folder: Location

    def get(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors cached under `name`, which encodes everything they depend on; computed if missing.

        Raises:
            UserError: the folder can neither be read nor written.
        """
        place = self.folder.child(f"{name}.safetensors")
        try:
            if (kept := _read(place)) is not None:
                return kept
            made = {key: value.detach().cpu().contiguous() for key, value in make().items()}
            place.write(save({**made, CHECKSUM: _checksum(made)}), durable=True)
        except OSError as error:
            raise UserError(f"cannot read or write the cache file {place.uri}: {error}") from None
        return made


def _read(file: Location) -> dict[str, Tensor] | None:
    """The tensors in a file; None: the file is missing or damaged."""
    try:
        tensors = load(file.read())
    except (FileNotFoundError, SafetensorError):
        return None
    found = tensors.pop(CHECKSUM, None)
    return tensors if found is not None and torch.equal(found, _checksum(tensors)) else None


def _checksum(tensors: dict[str, Tensor]) -> Tensor:
    return torch.tensor(list(bytes.fromhex(digest_of(tensors))), dtype=torch.uint8)
