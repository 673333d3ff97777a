"""The vLLM server of the teacher beside the run: what it is started with, after the teacher has
been compared with the student.
"""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

from onstream.pipeline.errors import UserError
from onstream.pipeline.http.vllm_server import become_server
from onstream.settings.devices import device_of
from onstream.settings.gpus import memory_share
from onstream.settings.plan import make_plan
from onstream.settings.root import Settings
from onstream.workers.teacher.compatibility import check
from onstream.workers.teacher.external.student_info import load_student_info
from onstream.workers.teacher.model_info import load_model_info

MAX_LOGPROBS = 20  # vLLM's own default
LEAST_CONTEXT = 4096


def serve(settings: Settings, port: int) -> NoReturn:
    """Turn this process into the server, on `port` of this machine alone.

    Raises:
        UserError: the teacher cannot judge the student's tokens, or its context is too short.
    """
    become_server(arguments(settings, port, context_tokens(settings)), settings.deployment)


def arguments(settings: Settings, port: int, context: int) -> list[str]:
    """The server's arguments, those of `teacher_inference.extra_args` last, so that they win."""
    local = settings.teacher_inference
    cpu = device_of(settings.deployment) == "cpu"
    name = local.model.name or settings.model.name
    path = Path(name).expanduser()
    options = {
        "--model": str(path) if path.is_dir() else name,
        "--served-model-name": name,
        "--host": "127.0.0.1",
        "--port": port,
        "--tensor-parallel-size": max(1, make_plan(settings).teacher_server),
        "--max-model-len": context,
        "--dtype": ("float32" if cpu else "bfloat16") if local.dtype == "auto" else local.dtype,
        "--max-logprobs": max(MAX_LOGPROBS, settings.trainer.loss.teacher_top_k),
        "--gpu-memory-utilization": memory_share(settings, "teacher") if not cpu else None,
    }
    flags = [
        "--enable-scale-out",
        *(["--enforce-eager"] if cpu else []),
    ]  # scale-out opens the route that takes and gives token ids
    return [
        *(str(part) for item in options.items() if item[1] is not None for part in item),
        *flags,
        *local.extra_args,
    ]


def context_tokens(settings: Settings) -> int:
    """The context that the server is given: room for prompts twice as long as those that were
    looked at, in what the teacher has.

    A server keeps room for one sequence of its whole context, so the teacher's own may be more than
    the memory holds.

    Raises:
        UserError: the teacher cannot judge the student's tokens, or its context is too short.
    """
    student = load_model_info(settings.model.name)
    teacher = load_model_info(settings.teacher_inference.model.name or settings.model.name)
    check(student, teacher, settings.inference.sampling.max_completion)
    longest = load_student_info(settings).longest_sample
    if teacher.context_tokens < longest + 1:
        raise UserError(
            f"the context of the teacher {teacher.name!r} is {teacher.context_tokens} tokens",
            expected=f"at least {longest + 1}: a sample of up to {longest} tokens, prompt and completion, and one more that vLLM takes",
            next_step='Lower inference.sampling.max_completion, or set teacher_inference.engine = "transformers", which needs no more.',
        )
    return min(teacher.context_tokens, max(LEAST_CONTEXT, 2 * (longest + 1)))
