"""Denoising diffusion models for images, trained on a Ray cluster: ddpm.train("digits").show()"""

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    if name in ("Run", "train"):
        return getattr(importlib.import_module("ddpm.api"), name)  # it imports PyTorch
    raise AttributeError(f"module 'ddpm' has no attribute {name!r}")
