"""Pieces of work for the worker pools of tests. Workers import this module by its name (see fetching.py)."""

import os
import signal
import time
from pathlib import Path

import torch
from torch import Tensor

from ddpm.utils.errors import UserError


class Adder:
    """Holds a number to add."""

    def __init__(self, number: Tensor, device: torch.device) -> None:
        self.number, self.device = int(number), device

    def add(self, piece: int) -> int:
        return self.number + piece


def who(adder: Adder, piece: int) -> tuple[int, int, str]:
    """The process, its torch threads, its device; after a time in which another worker would begin."""
    time.sleep(0.3)
    return os.getpid(), torch.get_num_threads(), str(adder.device)


def refuse(adder: Adder, piece: int) -> int:
    if piece == 3:
        raise UserError(f"piece is {piece}; it must not be 3")
    return piece


def die_once(folder: Path, adder: Adder, piece: int) -> int:
    """Piece 2 is its worker's death, the first time."""
    mark = folder / "died"
    if piece == 2 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return adder.add(piece)


def die(adder: Adder, piece: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return piece


def make_nothing(device: torch.device) -> Adder:
    raise UserError("nothing can be made of this")


def spin(adder: Adder, piece: int) -> int:
    """Piece 0 is done at once, every other takes minutes."""
    for _ in range(piece and 20_000):
        time.sleep(0.01)
    return piece
