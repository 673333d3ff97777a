"""What a process that runs vLLM itself needs: its environment, and vLLM's errors in a line."""

from __future__ import annotations

import os
import sys
from typing import Literal

from onstream.settings import engines
from onstream.settings.engines import vllm_environment
from onstream.settings.problems import SettingsError
from onstream.settings.rules.engines import vllm_missing

IN_PROCESS = {
    # a fork would copy the locks that this process's other threads hold
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
# Without this the engine's process would not compute by itself.
WITHOUT_WORKER_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
REASON_CHARACTERS = 300  # vLLM's reasons may run over a page


def prepare_process(
    device: Literal["cpu", "cuda"], *, alone: bool, setting: str, value: str = "vllm"
) -> None:
    """Set the environment that vLLM reads when it is imported, and that its processes inherit.

    What is set already stays. `alone` says that one process computes the whole model. `setting` is
    what asks for vLLM by `value`.

    Raises:
        SettingsError: vLLM is not installed.
    """
    if not engines.vllm_importable():
        raise SettingsError([vllm_missing(setting, value)])
    variables = IN_PROCESS | vllm_environment(device)
    if device == "cpu" and alone:
        variables |= WITHOUT_WORKER_PROCESS
    for name, text in variables.items():
        os.environ.setdefault(name, text)
    # A "" on the path means the working directory, which a spawned process may not share.
    sys.path[:] = [entry or os.getcwd() for entry in sys.path]


def reason_of(error: BaseException) -> str:
    """What `error` says, in a line that is not too long."""
    words = " ".join(str(error).split()) or type(error).__name__
    if len(words) > REASON_CHARACTERS:
        words = words[:REASON_CHARACTERS] + "…"
    return words
