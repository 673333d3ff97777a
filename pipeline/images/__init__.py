"""Images in prompts: read within limits, named by their content, and kept in Redis while in use."""

from __future__ import annotations

from onstream.pipeline.images.image_file import (
    ImageError,
    ImageFile,
    ImageLimits,
    PromptImage,
    grey_image,
    read_image,
)
from onstream.pipeline.images.message_parts import (
    Message,
    for_template,
    image_urls,
    reference_of,
    referred,
    with_urls,
)

__all__ = [
    "ImageError",
    "ImageFile",
    "ImageLimits",
    "Message",
    "PromptImage",
    "for_template",
    "grey_image",
    "image_urls",
    "read_image",
    "reference_of",
    "referred",
    "with_urls",
]
