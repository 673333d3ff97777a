"""Images behind http(s) URLs: from allowed hosts alone, read no further than the limits."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from onstream.pipeline.images.limits import ImageError, Limits, shown, too_large

if TYPE_CHECKING:
    import httpx


def fetched(url: str, limits: Limits) -> bytes:
    """The bytes behind `url`. Redirects are not followed, since they name other hosts.

    Raises:
        ImageError: the URL is not http(s), or of another host, or the host does not give it within
            the limits.
    """
    import httpx

    try:
        _require_allowed(httpx.URL(url), url, limits)
        return _read(url, limits)
    except httpx.TimeoutException as error:
        raise _too_slow(url, limits) from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ImageError(
            f"the image {shown(url)} cannot be fetched: {type(error).__name__}: {error}. Look whether this machine reaches the address."
        ) from error


def _require_allowed(parsed: httpx.URL, url: str, limits: Limits) -> None:
    if parsed.scheme not in ("http", "https"):
        raise ImageError(
            f"the image {shown(url)} is neither a data URL nor http(s); expected data:image/png;base64,…"
        )
    if parsed.host not in [host.lower() for host in limits.hosts]:
        allowed = ", ".join(limits.hosts) or "none"
        raise ImageError(
            f"the image {shown(url)} is on another host; images.allowed_hosts: {allowed}. "
            "Put images into the prompt as data:image/…;base64,…, or allow the host."
        )


def _read(url: str, limits: Limits) -> bytes:
    """The body of the reply, as it is sent: an encoding could unfold to any size."""
    import httpx

    deadline = time.monotonic() + limits.fetch_timeout_s
    data = bytearray()
    with httpx.stream(
        "GET", url, timeout=limits.fetch_timeout_s, headers={"Accept-Encoding": "identity"}
    ) as reply:
        if reply.status_code != httpx.codes.OK:
            where = (
                f" (to {reply.headers['location'][:200]!r}; redirects are not followed)"
                if reply.is_redirect
                else ""
            )
            raise ImageError(
                f"the image {shown(url)} was answered with status {reply.status_code}{where}; expected 200"
            )
        for chunk in reply.iter_raw():
            data += chunk
            if len(data) > limits.max_bytes:
                raise too_large(len(data), limits)
            if time.monotonic() > deadline:
                raise _too_slow(url, limits)
    return bytes(data)


def _too_slow(url: str, limits: Limits) -> ImageError:
    return ImageError(
        f"the image {shown(url)} took longer than images.fetch_timeout, {limits.fetch_timeout_s:g} s. "
        "Put it into the prompt as data:image/…;base64,…, or raise the limit."
    )
