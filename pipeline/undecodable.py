"""What msgspec raises at bytes from elsewhere: beside its own error, that of a text which is no
UTF-8, and that of nesting without end.
"""

from __future__ import annotations

from typing import Final

import msgspec

UNDECODABLE: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""For `except`: the bytes are not what they should be."""
