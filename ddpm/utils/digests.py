"""Digests of tensors."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def digest_of(tensors: Mapping[str, Tensor], recipe: str = "") -> str:
    """SHA-256 of names, shapes, types and bytes, and of `recipe`, the version of their use."""
    digest = hashlib.sha256(recipe.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
