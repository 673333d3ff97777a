"""From an image's URL to its bytes, checked: a known format, within the limits, and whole.

The header is read first. An image that would decode to more pixels than allowed is refused before any of them is.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}
_DATA = "data:"
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


@dataclass(frozen=True)
class Picture:
    """An image file, whole and within the limits."""

    data: bytes

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of the file, in hex."""
        return hashlib.sha256(self.data).hexdigest()

    @property
    def data_url(self) -> str:
        """The file as a `data:` URL."""
        from PIL import Image

        with Image.open(io.BytesIO(self.data)) as image:
            mime = FORMATS[str(image.format)]
        return f"{_DATA}{mime};base64,{base64.b64encode(self.data).decode()}"

    def decoded(self) -> Image:
        """The pixels, in RGB; what is transparent is shown on white."""
        from PIL import Image

        with Image.open(io.BytesIO(self.data)) as image:
            if "A" not in image.getbands() and "transparency" not in image.info:
                return image.convert("RGB")
            layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


def plain_picture(width: int, height: int) -> Picture:
    """A grey picture of that many pixels, to try out on processors how they read one."""
    from PIL import Image

    target = io.BytesIO()
    Image.new("RGB", (width, height), "grey").save(target, "PNG")
    return Picture(target.getvalue())


def read_picture(url: str, limits: Limits) -> Picture:
    """The image that `url` holds or names.

    Raises:
        ImageError: the URL is none that may be used, or what it gives is no whole image within `limits`.
    """
    data = _embedded(url, limits) if url.startswith(_DATA) else _fetched(url, limits)
    _check(data, limits)
    return Picture(data)


def _embedded(url: str, limits: Limits) -> bytes:
    head, comma, body = url.partition(",")
    if not comma or not head.endswith(";base64") or not head.startswith(f"{_DATA}image/"):
        raise ImageError(f"the image {_shown(url)} is no data URL of an image; expected data:image/png;base64,…")
    if len(body) > (limits.max_bytes * 4 + 2) // 3 + 4:
        raise _too_large(len(body) * 3 // 4, limits)
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"the image {_shown(url)} is not base64: {error}") from error


def _fetched(url: str, limits: Limits) -> bytes:
    """The bytes behind an http(s) URL, read no further than the limit; redirects are not followed, since they name other hosts."""
    import httpx

    parts = urlsplit(url)
    if parts.scheme not in ("http", "https"):
        raise ImageError(f"the image {_shown(url)} is neither a data URL nor http(s)")
    if parts.hostname not in limits.hosts:
        allowed = ", ".join(limits.hosts) or "none"
        raise ImageError(
            f"the image {_shown(url)} is on another host; images.allowed_hosts: {allowed}. "
            "Put images into the prompt as data:image/…;base64,…"
        )
    try:
        with httpx.stream("GET", url, timeout=limits.fetch_timeout_s) as reply:
            if reply.status_code != httpx.codes.OK:
                raise ImageError(f"the image {_shown(url)} was answered with status {reply.status_code}")
            data = bytearray()
            for chunk in reply.iter_bytes():
                data += chunk
                if len(data) > limits.max_bytes:
                    raise _too_large(len(data), limits)
    except httpx.HTTPError as error:
        raise ImageError(f"the image {_shown(url)} cannot be fetched: {type(error).__name__}: {error}") from error
    return bytes(data)


def _check(data: bytes, limits: Limits) -> None:
    from PIL import Image, UnidentifiedImageError

    if len(data) > limits.max_bytes:
        raise _too_large(len(data), limits)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit decides, before decoding
            image = Image.open(io.BytesIO(data), formats=tuple(FORMATS))
    except UnidentifiedImageError as error:
        raise ImageError(f"{len(data)} bytes are no image of a format that is read; expected one of {', '.join(FORMATS)}") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"the image is refused before decoding: {error}; images.max_pixels is {limits.max_pixels}") from error
    with image:
        pixels = image.width * image.height
        if pixels > limits.max_pixels:
            raise ImageError(
                f"the image has {image.width} × {image.height} = {pixels} pixels; images.max_pixels is {limits.max_pixels}. "
                "It was not decoded."
            )
        try:
            image.load()
        except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises depends on the format and on where the file is broken
            raise ImageError(f"the image is broken: {error}") from error


def _too_large(size_bytes: int, limits: Limits) -> ImageError:
    return ImageError(f"the image has {size_bytes} bytes or more; images.max_bytes is {limits.max_bytes}")


def _shown(url: str) -> str:
    return repr(url if len(url) <= _SHOWN else url[:_SHOWN] + "…")
