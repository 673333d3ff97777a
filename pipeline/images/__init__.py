"""Images in prompts: read from their URLs within limits, named by their content, and kept in Redis
while a rollout names them.
"""

from __future__ import annotations

from onstream.pipeline.images.limits import ImageError, Limits
from onstream.pipeline.images.message_parts import (
    Message,
    for_template,
    image_urls,
    reference_of,
    referred,
    with_urls,
)
from onstream.pipeline.images.reading import Picture, plain_picture, read_picture
from onstream.pipeline.images.shown_image import ShownImage

__all__ = [
    "ImageError",
    "Limits",
    "Message",
    "Picture",
    "ShownImage",
    "for_template",
    "image_urls",
    "plain_picture",
    "read_picture",
    "reference_of",
    "referred",
    "with_urls",
]
