"""The Lua scripts that change more than one thing at once, read from `lua/` once.

Each may run twice with the effect of once. They use commands of Redis 6.2 alone. Where one must
work on a Redis that is out of memory, its first write is a command that frees memory (XACK, DEL):
Redis refuses a script at its first write that needs memory, never in its middle. The head of each
file says what it does, its KEYS and ARGV, what it returns, and why it is safe to repeat.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files

_FOLDER = files("onstream.pipeline.redis") / "lua"


@dataclass(frozen=True)
class Script:
    """Lua source, and the SHA-1 that Redis knows the script by."""

    source: str
    sha: str


def _script(*names: str) -> Script:
    """The script made of the files `names`, in this order."""
    source = "\n".join((_FOLDER / f"{name}.lua").read_text() for name in names)
    return Script(source, hashlib.sha1(source.encode()).hexdigest())


def _fenced(*names: str) -> Script:
    """A script that only the trainer may run: KEYS[1] is the epoch's key, ARGV[1] its epoch."""
    return _script("fence", *names)


HOP = _script("hop")
RENEW = _script("renew")
GIVE_BACK = _script("give_back")
RETIRE = _script("retire")
FORGET_DEAD_CONSUMERS = _script("forget_dead_consumers")
HEARTBEAT = _script("heartbeat")
MARK_READY = _script("mark_ready")
NUMBERS = _script("numbers")

ACQUIRE = _script("acquire")
RENEW_LEASE = _fenced("renew_lease")
RELEASE_LEASE = _fenced("release_lease")
ISSUE = _fenced("missing_function", "issue")
REISSUE = _fenced("missing_function", "reissue")
RAISE_ISSUED = _fenced("raise_issued")
ANNOUNCE = _fenced("announce")
ACKNOWLEDGE = _fenced("release_function", "acknowledge")
SET_KEY = _fenced("set_key")
DELETE_KEY = _fenced("delete_key")
CLOSE_REQUESTS = _fenced("close_requests")
FILL_HASH = _fenced("fill_hash")

WRITE_CHUNK = _fenced("write_chunk")
OFFER_WEIGHTS = _fenced("offer_weights")

HOLD_IMAGES = _script("hold_images")
COUNT_IMAGES = _script("count_images")
RELEASE_IMAGES = _fenced("release_function", "release_images")

RECALL_SCORES = _script("recall_scores")
KEEP_SCORES = _script("keep_scores")
REPORT_SPENT = _script("report_spent")
