"""An image as a prompt shows it: the file, and what the student's processor makes of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from onstream.pipeline.images.reading import Picture

if TYPE_CHECKING:
    from onstream.pipeline.models.image_features import ImageFeatures


@dataclass(frozen=True)
class ShownImage:
    """An image that a prompt shows: the file, and what the student's processor makes of it."""

    picture: Picture
    features: ImageFeatures
