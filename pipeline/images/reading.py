"""From an image's URL to its bytes, checked: a known format, within the limits, and whole.

The header is read first. An image that would decode to more pixels than allowed is refused before
any of them is.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from onstream.pipeline.images.fetching import fetched
from onstream.pipeline.images.limits import ImageError, Limits, shown, too_large

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}
_KNOWN = ", ".join(FORMATS)
_DATA = "data:"
MAX_ASPECT = 200
"""The most that a longest side may be of a shortest. Qwen-VL's processors take no more; others
scale by the shortest side, whatever becomes of the longest."""


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
        with _opened(self.data) as image:
            mime = FORMATS.get(
                str(image.format), "image/jpeg"
            )  # Pillow has a name of its own for a JPEG that holds another one
        return f"{_DATA}{mime};base64,{base64.b64encode(self.data).decode()}"

    def decoded(self) -> Image:
        """The pixels, in RGB and the right way up; what is transparent is shown on white."""
        from PIL import Image, ImageOps

        with _opened(self.data) as file:
            image = ImageOps.exif_transpose(
                file
            )  # as those do who serve models to which images are sent
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
        ImageError: the URL is none that may be used, or what it gives is no whole image within
            `limits`.
    """
    data = _embedded(url, limits) if url.startswith(_DATA) else fetched(url, limits)
    _check(data, limits)
    return Picture(data)


def _embedded(url: str, limits: Limits) -> bytes:
    head, comma, body = url.partition(",")
    if not comma or not head.endswith(";base64") or not head.startswith(f"{_DATA}image/"):
        raise ImageError(
            f"the image {shown(url)} is no data URL of an image; expected data:image/png;base64,…"
        )
    if len(body) > (limits.max_bytes * 4 + 2) // 3 + 4:
        raise too_large(len(body) * 3 // 4, limits)
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(
            f"the image {shown(url)} is not base64: {error}; expected the bytes of a file in base64"
        ) from error


def _check(data: bytes, limits: Limits) -> None:
    from PIL import Image, UnidentifiedImageError

    if len(data) > limits.max_bytes:
        raise too_large(len(data), limits)
    try:
        with _opened(data) as image:
            _check_header(image, limits)
            image.load()
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(
            f"{len(data)} bytes, which begin with {data[:8]!r}, are no whole image of a format that is read; "
            f"expected one of {_KNOWN}. Convert it."
        ) from error
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"the image is refused before decoding: {error}; images.max_pixels is {limits.max_pixels}"
        ) from error
    except (
        Exception
    ) as error:  # what Pillow raises depends on the format and on where the file is broken
        raise ImageError(
            f"the image is broken: {error}; expected a whole file in {_KNOWN}. Replace it, or leave it out of the task."
        ) from error


def _check_header(image: Image, limits: Limits) -> None:
    """Raises ImageError for what the header alone tells."""
    size = f"{image.width} × {image.height}"
    if image.width * image.height > limits.max_pixels:
        raise ImageError(
            f"the image has {size} = {image.width * image.height} pixels; images.max_pixels is {limits.max_pixels}. "
            "It was not decoded. Scale it down, or raise the limit."
        )
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise ImageError(
            f"the image has {size} pixels; expected sides of at most {MAX_ASPECT} to 1. Crop it."
        )
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format in FORMATS:  # a JPEG that holds others is shown by its first
        raise ImageError(
            f"the image is an animation of {frames} frames; expected one that does not move. Put frames in as images."
        )


def _opened(data: bytes) -> Image:
    """The image in `data`, of which the header is read, and nothing decoded."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit decides
        return Image.open(io.BytesIO(data), formats=tuple(FORMATS))
