"""Time that OpenMP's threads spin before they sleep, on CPUs.

By default they spin without end, on a core that another process could use.
"""

import os

SPIN_COUNT = "3000"
"""The shorter, the faster beside busy processes, and the slower on a quiet machine (benchmarks/busy.md)."""

VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
"""Either one says how threads wait."""


def bound_spinning() -> None:
    """Bound spinning in this process and those it starts, unless the environment says otherwise.

    Call it before PyTorch is imported: PyTorch's OpenMP (libgomp) reads GOMP_SPINCOUNT when it is loaded.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
