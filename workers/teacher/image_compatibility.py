"""Whether a teacher reads a student's prompts with images: both processors must make the same
tokens of an image.
"""

from __future__ import annotations

import numpy as np

from onstream.pipeline.errors import UserError
from onstream.pipeline.images import grey_image
from onstream.pipeline.images.vision import Vision

SIZES = ((32, 32), (448, 336), (300, 900))
"""Width and height, in pixels, of the pictures that the processors are compared on."""


def same_tokens(student: Vision, teacher: Vision, student_name: str, teacher_name: str) -> None:
    """Do nothing where both processors put the same tokens into a prompt.

    Raises:
        UserError: they differ in the number of tokens, or in the tokens, of a picture of some size.
    """
    for width, height in SIZES:
        picture = grey_image(width, height)
        ours = student.features(picture).token_ids
        theirs = teacher.features(picture).token_ids
        if not np.array_equal(ours, theirs):
            raise UserError(
                f"of a picture of {width} × {height} the processor of {student_name} makes {len(ours)} tokens, {_shown(ours)}, "
                f"and that of {teacher_name} {len(theirs)}, {_shown(theirs)}",
                expected="processors that put the same tokens into a prompt",
                next_step="Use a teacher of the student's family, with the same sizes in preprocessor_config.json.",
            )


def _shown(ids: np.ndarray[tuple[int, ...], np.dtype[np.int32]]) -> str:
    kinds = ", ".join(map(str, dict.fromkeys(ids.tolist())))
    return f"of the ids {kinds}"
