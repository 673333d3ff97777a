"""`[images]`: which pictures a prompt may hold."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from onstream.settings.base import RUN, WORKER, Section, Unit


class ImagesSettings(Section):
    """Limits of the images in prompts. An image beyond them is a dead letter with the reason; the
    run goes on.
    """

    max_bytes: Annotated[int, RUN, Unit("bytes"), Field(ge=1, le=1 << 30)] = 16 << 20
    """The largest image file."""
    max_pixels: Annotated[int, RUN, Unit("pixels"), Field(ge=1, le=1 << 27)] = 1 << 25
    """The most pixels, width times height. Read from the file's header, before anything is decoded.
    """
    max_per_prompt: Annotated[int, RUN, Unit("images"), Field(ge=1, le=1024)] = 16
    """The most images in one prompt."""
    allowed_hosts: Annotated[tuple[str, ...], RUN, Field(max_length=64)] = ()
    """Hosts that http(s) URLs of images may name. Empty: such URLs are refused, and images come in
    prompts as `data:image/…;base64,…`.
    """
    keep_bytes: Annotated[int, WORKER, Unit("bytes"), Field(ge=0, le=1 << 40)] = 1 << 30
    """Memory that a teacher or the trainer keeps of processed images, so that what rollouts share
    is processed once.
    """
    fetch_timeout: Annotated[float, WORKER, Unit("s"), Field(ge=0.1, le=600)] = 10.0
    """How long fetching one image from an allowed host may take."""
