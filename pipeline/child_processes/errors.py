"""An error of the user's own code in one line."""

from __future__ import annotations

import os
import traceback

MAX_REASON_CHARACTERS = 500


def reason_of(error: BaseException, called: object) -> str:
    """`error` and where it came from, on one short line that always encodes.

    To be called where the error is caught. `called` is the user's function, whose own place is
    given where the call of it failed.
    """
    try:
        text = f"{type(error).__name__}: {error}"
    except Exception:  # an exception of the user's own whose text fails
        text = type(error).__name__
    shown = text.encode(errors="replace").decode()[:MAX_REASON_CHARACTERS]
    return shown + _place(error, called)


def _place(error: BaseException, called: object) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    if len(frames) > 1:  # the first is that of the call
        return f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})"
    code = getattr(called, "__code__", None)
    return f" ({os.path.basename(code.co_filename)}:{code.co_firstlineno})" if code else ""
