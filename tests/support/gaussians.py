"""Known metric values for normally distributed features."""

import numpy as np
from numpy.typing import NDArray


def true_kid(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """KID of the populations N(a, I) and N(b, I)."""
    return _kernel(a, a) + _kernel(b, b) - 2 * _kernel(a, b)


def _kernel(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """E[(x y / F + 1)^3] of independent x from N(a, I) and y from N(b, I), from the moments of x y."""
    size, ab = len(a), float(a @ b)
    spread = a @ a + b @ b + size
    first, second, third = ab, ab**2 + spread, ab**3 + 3 * ab * spread + 6 * ab
    return float(1 + 3 * first / size + 3 * second / size**2 + third / size**3)
