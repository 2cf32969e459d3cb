"""Functions that the worker pools of tests run.

Workers import this module by its name. A test module they could not: torch-fidelity 0.4 installs a package `tests` too.
"""

import os
import signal
import time
from pathlib import Path

import torch
from torch import Tensor

from ddpm.sampling.pool import check_cancelled
from ddpm.utils.errors import UserError
from support.processes import wait_for


class Adder:
    """A worker's state: the number to add."""

    num_made = 0
    """Objects of this class that this process has made."""

    def __init__(self, number: Tensor, device: torch.device) -> None:
        self.number = int(number)
        self.device = device
        Adder.num_made += 1

    def add(self, piece: int) -> int:
        return self.number + piece


def worker_info(folder: Path, num_processes: int, adder: Adder, piece: int) -> tuple[int, int, str]:
    """Process ID, number of torch threads and device, once so many processes have taken a piece."""
    (folder / str(os.getpid())).touch()
    wait_for(lambda: len(list(folder.iterdir())) >= num_processes)
    return os.getpid(), torch.get_num_threads(), str(adder.device)


def num_made(adder: Adder, piece: int) -> tuple[int, int]:
    """Process ID, and the number of objects that the process has made."""
    return os.getpid(), Adder.num_made


def refuse(adder: Adder, piece: int) -> int:
    if piece == 3:
        raise UserError(f"piece is {piece}; it must not be 3")
    return piece


def die_once(folder: Path, adder: Adder, piece: int) -> int:
    """Add; the first time that piece 2 runs, it kills its worker."""
    mark = folder / "died"
    if piece == 2 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return adder.add(piece)


def die(adder: Adder, piece: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return piece


def fail_to_make(device: torch.device) -> Adder:
    raise UserError("nothing can be made of this")


def run_for_ever(adder: Adder, piece: int) -> int:
    """Return piece 0; every other piece runs until it is cancelled."""
    while piece != 0:
        time.sleep(0.01)
        check_cancelled()
    return piece
