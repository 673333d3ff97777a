"""Messages with images among their content parts, in the form of OpenAI's chat API.

A part is `{"type": "image_url", "image_url": {"url": "data:image/png;base64,…"}}`. In records the
URL is a reference, `image:<digest>`, to bytes that Redis has once. Pure: nothing is fetched or
decoded here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

Message = dict[str, Any]

_SCHEME = "image:"


def image_urls(messages: Sequence[Message]) -> list[str]:
    """The URLs of all images, in the order of the messages and of their parts.

    Raises:
        ValueError: an image part has no URL.
    """
    return [_url(part) for message in messages for part in _image_parts(message)]


def with_urls(
    messages: Sequence[Message], url_of: Mapping[str, str] | Callable[[str], str]
) -> list[Message]:
    """`messages` with every image's URL replaced by `url_of`'s. The rest is shared, not copied."""
    replace = url_of if callable(url_of) else url_of.__getitem__
    return [_replaced(message, replace) for message in messages]


def reference_of(digest: str) -> str:
    """The URL by which a record names an image."""
    return _SCHEME + digest


def referred(messages: Sequence[Message]) -> list[str]:
    """The digests of the images that `messages` refer to, in order, repeats included."""
    return [url.removeprefix(_SCHEME) for url in image_urls(messages) if url.startswith(_SCHEME)]


def for_template(messages: Sequence[Message]) -> list[Message]:
    """`messages` as chat templates expect those with images.

    An image becomes `{"type": "image"}`, and every content a list of parts: templates like LLaVA's
    do not know `image_url`, and render nothing of a content that is plain text. Messages without
    any image are left as they are, for templates that know text only.
    """
    if not any(True for message in messages for _ in _image_parts(message)):
        return list(messages)
    return [_with_parts(message) for message in messages]


def is_image(part: object) -> bool:
    """Whether a content part is an image."""
    return isinstance(part, dict) and part.get("type") == "image_url"


def _image_parts(message: Message) -> Iterator[dict[str, Any]]:
    content = message.get("content")
    if isinstance(content, list):
        yield from (part for part in content if is_image(part))


def _with_parts(message: Message) -> Message:
    content = message.get("content")
    if not content:
        return message
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    parts = [{"type": "image"} if is_image(part) else part for part in content]
    return {**message, "content": parts}


def _url(part: dict[str, Any]) -> str:
    image = part.get("image_url")
    url = image.get("url") if isinstance(image, dict) else image
    if not isinstance(url, str) or not url:
        raise ValueError(
            'an image part has no URL; expected {"type": "image_url", '
            '"image_url": {"url": "data:image/…;base64,…"}}'
        )
    return url


def _replaced(message: Message, replace: Callable[[str], str]) -> Message:
    content = message.get("content")
    if not isinstance(content, list) or not any(map(is_image, content)):
        return message
    parts = [
        {**part, "image_url": {"url": replace(_url(part))}} if is_image(part) else part
        for part in content
    ]
    return {**message, "content": parts}
