"""Time that OpenMP's threads spin before they sleep, on CPUs.

By default they spin without end, on a core that another process could use.
"""

import os

SPIN_COUNT = "10000"
"""Digits on two cores, alone and beside one busy process, one run of 45 s each: endless 704 and 48 images/s, 10000 696
and 166, OMP_WAIT_POLICY=passive 406 and 217."""


VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
"""Either one says how threads wait."""


def bound_spinning() -> None:
    """Bound spinning in this process and those it starts, unless the environment says otherwise.

    Call it before PyTorch is imported: PyTorch's OpenMP (libgomp) reads GOMP_SPINCOUNT when it is loaded.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
