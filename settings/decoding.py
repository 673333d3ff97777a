"""What decoding may raise. Not in `pipeline/errors.py`: `--help` does not wait for msgspec."""

from __future__ import annotations

from typing import Final

import msgspec

UNDECODABLE: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""For `except`: what msgspec raises at bytes that are not what they should be.

That is its own error, that of a text which is not UTF-8, and that of endless nesting.
"""
