"""What scores for the teacher beside the run: workers of its own with transformers, or a vLLM
server that is started for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Literal

from onstream.settings.devices import device_of
from onstream.settings.root import Settings

TAKEN_FLAGS = {
    "--model": "teacher_inference.model.name",
    "--served-model-name": "teacher_inference.model.name",
    "--tensor-parallel-size": "deployment.num_teacher_gpus",
    "-tp": "deployment.num_teacher_gpus",
    "--host": "",
    "--port": "",
    "--uds": "",
    "--api-key": "",
}
"""The server's flags that are not left to `teacher_inference.extra_args`, and the settings that
they come from, if any.
"""


def vllm_importable() -> bool:
    """Whether vLLM is installed here; found, not imported, which would take ten seconds."""
    spec = find_spec("vllm")
    return (
        spec is not None and spec.origin is not None
    )  # a directory of that name in the working directory has no origin


def teacher_engine(settings: Settings) -> Literal["transformers", "vllm"]:
    """What scores for the teacher beside the run, if there is one."""
    engine = settings.teacher_inference.engine
    if engine != "auto":
        return engine
    return (
        "vllm" if device_of(settings.deployment) == "cuda" and vllm_importable() else "transformers"
    )


def taken_flags(settings: Settings) -> Iterator[tuple[str, str]]:
    """The flags in `teacher_inference.extra_args` that are taken, each with the setting that it
    comes from, or nothing.
    """
    for argument in settings.teacher_inference.extra_args:
        flag = argument.partition("=")[0].replace("_", "-")
        if flag in TAKEN_FLAGS:
            yield flag, TAKEN_FLAGS[flag]
