"""Seeds as counters: randomness is a function of its purpose and position, never of saved state.

The counters (seed, purpose, step, micro-batch, ...) are hashed to the key of a counter-based generator. All of them
matter: (2,) and (2, 0) have different keys, and so do 5 + 2**32 and (5, 1).

This module imports neither PyTorch nor NumPy: processes that only read data import it.
"""

import hashlib
from enum import IntEnum

GENERATOR = "philox4x64-blake2b/1"
"""Name of the algorithm from counters to random numbers, stored in checkpoints; a new algorithm has a new name."""


class Purpose(IntEnum):
    """The second counter, which separates the streams of different purposes."""

    INIT = 0
    TRAIN = 1
    HELD_OUT = 2
    SAMPLE = 3
    LIKELIHOOD = 4
    DROPOUT = 5
    ORDER = 6
    MEASURE = 7


def key(*counters: int) -> int:
    """A 128-bit key that depends on all counters, their number and their order.

    BLAKE2b of their decimal digits: two of 10^9 tuples share a key with a probability of about 10^-21.
    """
    text = ",".join(str(int(counter)) for counter in counters)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def torch_seed(*counters: int) -> int:
    """A 64-bit seed for PyTorch's own generators: GPU generators use all bits, the CPU generator the low 32."""
    return key(*counters) % 2**64
