"""Time that OpenMP's threads spin before they sleep, on CPUs.

By default they spin without end, on a core that another process could use.
"""

import os

SPIN_COUNT = "3000"
"""A lower count is faster beside busy processes and slower on an idle machine (benchmarks/busy.md)."""

VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
"""Variables that set how threads wait; either is enough."""


def bound_spinning() -> None:
    """Limit spinning in this process and its children, unless the environment sets one of VARIABLES.

    Call it before PyTorch is imported: PyTorch's OpenMP (libgomp) reads GOMP_SPINCOUNT when it is loaded.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
