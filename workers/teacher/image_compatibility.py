"""Whether a teacher can score prompts with images: do both processors make the same tokens?"""

from __future__ import annotations

import numpy as np

from onstream.pipeline.errors import UserError
from onstream.pipeline.images import grey_image
from onstream.pipeline.images.vision import Vision

SIZES = ((32, 32), (448, 336), (300, 900))
"""Width and height, in pixels, of the images that the processors are compared on."""


def check_image_tokens(
    student: Vision, teacher: Vision, student_name: str, teacher_name: str
) -> None:
    """Check that both processors put the same tokens into a prompt.

    Raises:
        UserError: they differ in the tokens, or their number, for an image of some size.
    """
    for width, height in SIZES:
        picture = grey_image(width, height)
        ours = student.features(picture).token_ids
        theirs = teacher.features(picture).token_ids
        if not np.array_equal(ours, theirs):
            raise UserError(
                f"of an image of {width} × {height} the processor of {student_name} makes "
                f"{len(ours)} tokens, {_shown(ours)}, "
                f"and that of {teacher_name} {len(theirs)}, {_shown(theirs)}",
                expected="processors that put the same tokens into a prompt",
                next_step="Use a teacher of the student's family, with the same sizes in "
                "preprocessor_config.json.",
            )


def _shown(ids: np.ndarray[tuple[int, ...], np.dtype[np.int32]]) -> str:
    kinds = ", ".join(map(str, dict.fromkeys(ids.tolist())))
    return f"of the ids {kinds}"
