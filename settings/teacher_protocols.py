"""The protocols that servers can be asked for logprobs in: a table of name → class path.

A new protocol is one module and one line here. EXTENDING.md has a worked example.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

_FOLDER = "onstream.workers.teacher.external.protocols"
TEACHER_PROTOCOLS: Mapping[str, str] = {
    "vllm-generate": f"{_FOLDER}.vllm:VllmGenerate",
    "vllm-completions": f"{_FOLDER}.vllm:VllmCompletions",
    "echo": f"{_FOLDER}.echo:Echo",
    "sglang": f"{_FOLDER}.sglang:Sglang",
}
"""`module:class` of each protocol, imported only by the worker that asks. `auto` tries them in this
order.
"""

if TYPE_CHECKING:
    ProtocolName = str
else:
    ProtocolName = Literal[("auto", *TEACHER_PROTOCOLS)]
