"""From an image's URL to its file: `data:` URLs, and http(s) from allowed hosts."""

from __future__ import annotations

import base64
import binascii
import time
from typing import TYPE_CHECKING

from onstream.pipeline.images.image_file import (
    ImageError,
    ImageFile,
    ImageLimits,
    checked,
    too_large,
)

if TYPE_CHECKING:
    import httpx

_DATA = "data:"
_SHOWN_CHARACTERS = 60  # of a URL in a message


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
    """The body of the reply, without a content encoding: one could unfold to any size."""
    import httpx

    deadline = time.monotonic() + limits.fetch_timeout_s
    headers = {"Accept-Encoding": "identity"}
    data = bytearray()
    with httpx.stream("GET", url, timeout=limits.fetch_timeout_s, headers=headers) as reply:
        _require_ok(reply, url)
        for chunk in reply.iter_raw():
            data += chunk
            if len(data) > limits.max_bytes:
                raise too_large(len(data), limits)
            # httpx's timeout is for each read; a host that sends slowly is caught here.
            if time.monotonic() > deadline:
                raise _too_slow(url, limits)
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
