"""The built-in task `colour-words`: name the colours in a picture. The pictures are drawn here."""

from __future__ import annotations

import base64
import io
from random import Random
from typing import Annotated, Any

import msgspec

from onstream.pipeline.tasks.base import Draw

COLOURS = {
    "red": (215, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (230, 205, 50),
    "purple": (150, 60, 180),
    "white": (240, 240, 240),
}
_BACKGROUND = 40
"""The brightest value of a background's channels."""
_NOISE = 12
"""How far a colour strays in each channel."""


class PictureArgs(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Pictures of `shapes` discs side by side, each in a square of `side` pixels."""

    shapes: Annotated[int, msgspec.Meta(ge=1, le=8)] = 2
    side: Annotated[int, msgspec.Meta(ge=8, le=1024)] = 16


def colour_words(args: PictureArgs) -> Draw:
    """A picture of a red disc and a blue one → `red blue`."""

    def draw(random: Random) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        names = random.choices(list(COLOURS), k=args.shapes)
        return [_image_part(picture(names, args.side, random))], {"answer": " ".join(names)}

    return draw


def picture(names: list[str], side: int, random: Random) -> bytes:
    """A PNG file of discs in the colours `names`, on a dark background. Places and shades vary."""
    from PIL import Image, ImageDraw  # only workers that draw need it

    background = tuple(random.randint(0, _BACKGROUND) for _ in range(3))
    image = Image.new("RGB", (side * len(names), max(2 * side, 16)), background)
    pen = ImageDraw.Draw(image)
    for place, name in enumerate(names):
        radius = side * random.uniform(0.35, 0.48)
        x = side * place + random.uniform(radius, side - radius)
        y = random.uniform(radius, image.height - radius)
        shade = tuple(_strayed(channel, random) for channel in COLOURS[name])
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=shade)
    target = io.BytesIO()
    image.save(target, "PNG")
    return target.getvalue()


def _strayed(channel: int, random: Random) -> int:
    return min(255, max(0, channel + random.randint(-_NOISE, _NOISE)))


def _image_part(png: bytes) -> dict[str, Any]:
    url = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}
