"""An image file, read from its URL: a known format, within the limits, and whole.

The header is read first. An image that would decode to more pixels than allowed is refused before
any pixel is decoded. URLs are `data:`, or http(s) of allowed hosts.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import io
import threading
import warnings
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import httpx
    from PIL.Image import Image

    from onstream.pipeline.models.multimodal import ImageFeatures

FORMATS = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}
_KNOWN = ", ".join(FORMATS)
MAX_ASPECT = 200
"""The longest side is at most this many times the shortest.

Qwen-VL's processors take no more. Others scale by the shortest side, however long the other is.
"""
LOOKUP_S = 1.0
"""How much longer than its limit a fetch is waited for that cannot be cancelled."""
_DATA = "data:"
_SHOWN_CHARACTERS = 60  # of a URL in a message


class ImageError(ValueError):
    """An image that cannot be used. The message says what it is and what was expected."""


@dataclass(frozen=True)
class ImageLimits:
    """Limits on one image. URLs other than `data:` are fetched from `hosts` only."""

    max_bytes: int
    max_pixels: int
    hosts: Sequence[str] = ()
    fetch_timeout_s: float = 10.0


@dataclass(frozen=True)
class ImageFile:
    """An image file, whole and within the limits."""

    data: bytes

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of the file, in hexadecimal."""
        return hashlib.sha256(self.data).hexdigest()

    @property
    def data_url(self) -> str:
        """The file as a `data:` URL."""
        with _opened(self.data) as image:
            # Pillow has its own name (MPO) for a JPEG that contains further images.
            mime = FORMATS.get(str(image.format), "image/jpeg")
        return f"data:{mime};base64,{base64.b64encode(self.data).decode()}"

    def decoded(self) -> Image:
        """The pixels as RGB, turned as EXIF says, with transparent parts on white."""
        from PIL import Image, ImageOps

        with _opened(self.data) as file:
            image = ImageOps.exif_transpose(file)  # as model servers do with the images they get
            if "A" not in image.getbands() and "transparency" not in image.info:
                return image.convert("RGB")
            layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")


@dataclass(frozen=True)
class PromptImage:
    """An image in a prompt: its file, and what the student's processor makes of it."""

    file: ImageFile
    features: ImageFeatures


def grey_image(width: int, height: int) -> ImageFile:
    """A plain grey image of that many pixels, to test how a processor or a server reads images."""
    from PIL import Image

    target = io.BytesIO()
    Image.new("RGB", (width, height), "grey").save(target, "PNG")
    return ImageFile(target.getvalue())


def checked(data: bytes, limits: ImageLimits) -> ImageFile:
    """`data` as an image file.

    Raises:
        ImageError: it is not a whole image of a known format within `limits`.
    """
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
            f"{len(data)} bytes, which begin with {data[:8]!r}, "
            f"are no whole image of a format that is read; expected one of {_KNOWN}. Convert it."
        ) from error
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"the image is refused before decoding: {error}; "
            f"images.max_pixels is {limits.max_pixels}"
        ) from error
    except Exception as error:  # what Pillow raises depends on the format and on the damage
        raise ImageError(
            f"the image is broken: {error}; expected a whole file in {_KNOWN}. "
            "Replace it, or leave it out of the task."
        ) from error
    return ImageFile(data)


def too_large(size_bytes: int, limits: ImageLimits) -> ImageError:
    """The error for an image that has `size_bytes` or more."""
    return ImageError(
        f"the image has {size_bytes} bytes or more; images.max_bytes is {limits.max_bytes}. "
        "Shrink it, or raise the limit."
    )


def _check_header(image: Image, limits: ImageLimits) -> None:
    """Raise ImageError for what the header alone shows."""
    pixels = image.width * image.height
    size = f"{image.width} × {image.height}"
    if pixels > limits.max_pixels:
        raise ImageError(
            f"the image has {size} = {pixels} pixels; images.max_pixels is {limits.max_pixels}. "
            "It was not decoded. Scale it down, or raise the limit."
        )
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise ImageError(
            f"the image has {size} pixels; expected sides of at most {MAX_ASPECT} to 1. Crop it."
        )
    frames = getattr(image, "n_frames", 1)
    # A JPEG that contains further images (MPO) has frames too; its first image is used.
    if frames > 1 and image.format in FORMATS:
        raise ImageError(
            f"the image is an animation of {frames} frames; expected one that does not move. "
            "Put frames in as images."
        )


def _opened(data: bytes) -> Image:
    """The image in `data`, with its header read and nothing decoded."""
    from PIL import Image

    with warnings.catch_warnings():
        # max_pixels decides, not Pillow's own limit.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(io.BytesIO(data), formats=tuple(FORMATS))


def read_image(url: str, limits: ImageLimits) -> ImageFile:
    """The image that `url` contains or points to.

    Raises:
        ImageError: the URL may not be used, or does not give a whole image within `limits`.
    """
    data = _embedded(url, limits) if url.startswith(_DATA) else _fetched(url, limits)
    return checked(data, limits)


def _embedded(url: str, limits: ImageLimits) -> bytes:
    head, comma, body = url.partition(",")
    if not comma or not head.endswith(";base64") or not head.startswith(f"{_DATA}image/"):
        raise ImageError(
            f"the image {_shown(url)} is no data URL of an image; expected data:image/png;base64,…"
        )
    # Checked before decoding: base64 takes 4 characters for 3 bytes, and up to 4 of padding.
    if len(body) > (limits.max_bytes * 4 + 2) // 3 + 4:
        raise too_large(len(body) * 3 // 4, limits)
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(
            f"the image {_shown(url)} is not base64: {error}; "
            "expected the bytes of a file in base64"
        ) from error


def _fetched(url: str, limits: ImageLimits) -> bytes:
    """The bytes behind an http(s) URL. Redirects are not followed: they lead to other hosts."""
    import httpx

    try:
        _require_allowed(httpx.URL(url), url, limits)
        return _download(url, limits)
    except httpx.TimeoutException as error:
        raise _too_slow(url, limits) from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ImageError(
            f"the image {_shown(url)} cannot be fetched: {type(error).__name__}: {error}. "
            "Check whether this machine reaches the address."
        ) from error


def _require_allowed(parsed: httpx.URL, url: str, limits: ImageLimits) -> None:
    if parsed.scheme not in ("http", "https"):
        raise ImageError(
            f"the image {_shown(url)} is neither a data URL nor http(s); "
            "expected data:image/png;base64,…"
        )
    if parsed.host not in [host.lower() for host in limits.hosts]:
        allowed = ", ".join(limits.hosts) or "none"
        raise ImageError(
            f"the image {_shown(url)} is on another host; images.allowed_hosts: {allowed}. "
            "Put images into the prompt as data:image/…;base64,…, or allow the host."
        )


def _download(url: str, limits: ImageLimits) -> bytes:
    """The body of the reply, within `limits.fetch_timeout_s`, headers and all.

    httpx bounds each single read; only a task that can be cancelled bounds them together. It runs
    in a thread, since callers may have an event loop of their own, or none.
    """
    body = Future[bytes]()

    def fetch() -> None:
        try:
            body.set_result(asyncio.run(_body(url, limits)))
        except BaseException as error:
            body.set_exception(error)

    threading.Thread(target=fetch, name="image", daemon=True).start()
    try:
        # Looking up a name cannot be cancelled: its thread is left behind.
        return body.result(limits.fetch_timeout_s + LOOKUP_S)
    except TimeoutError as error:
        raise _too_slow(url, limits) from error


async def _body(url: str, limits: ImageLimits) -> bytes:
    """The body without a content encoding: one could unfold to any size."""
    import httpx

    headers = {"Accept-Encoding": "identity"}
    data = bytearray()
    async with (
        asyncio.timeout(limits.fetch_timeout_s),
        httpx.AsyncClient(timeout=limits.fetch_timeout_s, headers=headers) as client,
        client.stream("GET", url) as reply,
    ):
        _require_ok(reply, url)
        async for chunk in reply.aiter_raw():
            data += chunk
            if len(data) > limits.max_bytes:
                raise too_large(len(data), limits)
    return bytes(data)


def _require_ok(reply: httpx.Response, url: str) -> None:
    import httpx

    if reply.status_code == httpx.codes.OK:
        return
    target = ""
    if reply.is_redirect:
        target = f" (to {reply.headers['location'][:200]!r}; redirects are not followed)"
    raise ImageError(
        f"the image {_shown(url)} was answered with status {reply.status_code}{target}; "
        "expected 200"
    )


def _too_slow(url: str, limits: ImageLimits) -> ImageError:
    return ImageError(
        f"the image {_shown(url)} took longer than images.fetch_timeout, "
        f"{limits.fetch_timeout_s:g} s. "
        "Put it into the prompt as data:image/…;base64,…, or raise the limit."
    )


def _shown(url: str) -> str:
    """`url` as messages show it: quoted, and cut where it is long."""
    if len(url) > _SHOWN_CHARACTERS:
        url = url[:_SHOWN_CHARACTERS] + "…"
    return repr(url)
