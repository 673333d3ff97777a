"""How sure a share is."""

from __future__ import annotations

from math import sqrt

Z = 1.96
"""Standard deviations on either side of the mean that hold 95 % of a normal distribution."""


def interval(right: int, asked: int) -> tuple[float, float]:
    """The 95 % interval of a share of `right` in `asked` (Wilson, 1927).

    >>> tuple(round(end, 3) for end in interval(128, 256))
    (0.439, 0.561)
    """
    share = right / asked
    spread = Z**2 / asked
    middle = share + spread / 2
    width = Z * sqrt(share * (1 - share) / asked + spread / (4 * asked))
    return (middle - width) / (1 + spread), (middle + width) / (1 + spread)


def shares(right: int, asked: int) -> tuple[str, str]:
    """A share, and its interval, as a table shows them."""
    low, high = interval(right, asked)
    return f"{right / asked:.3f}", f"{low:.3f}–{high:.3f}"
