"""What an image may come to, and how it is said of one that it does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_SHOWN = 60  # characters of a URL in a message


class ImageError(ValueError):
    """An image that cannot be used: what it is, and what was expected."""


@dataclass(frozen=True)
class Limits:
    """What an image may come to. URLs other than `data:` are fetched from `hosts` alone."""

    max_bytes: int
    max_pixels: int
    hosts: Sequence[str] = ()
    fetch_timeout_s: float = 10.0


def too_large(size_bytes: int, limits: Limits) -> ImageError:
    """What to say of an image that has `size_bytes`, or more."""
    return ImageError(
        f"the image has {size_bytes} bytes or more; images.max_bytes is {limits.max_bytes}. Shrink it, or raise the limit."
    )


def shown(url: str) -> str:
    """`url`, as far as a message shows one."""
    return repr(url if len(url) <= _SHOWN else url[:_SHOWN] + "…")
