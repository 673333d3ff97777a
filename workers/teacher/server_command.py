"""vLLM for a teacher beside the run: its arguments, and the checks before it starts as a server."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

from onstream.pipeline.errors import UserError
from onstream.pipeline.http.vllm_server import become_server
from onstream.settings.devices import device_of
from onstream.settings.gpus import memory_share
from onstream.settings.plan import make_plan
from onstream.settings.root import Settings
from onstream.workers.teacher.compatibility import check_compatible, load_student, load_teacher
from onstream.workers.teacher.external.student_info import load_student_info

MAX_LOGPROBS = 20
"""vLLM's own default."""
LEAST_CONTEXT = 4096


def serve(settings: Settings, port: int) -> NoReturn:
    """Turn this process into the server, on `port` of this machine alone.

    Raises:
        UserError: the teacher cannot score the student's tokens, or its context is too short.
    """
    become_server(arguments(settings, port, context_tokens(settings)), settings.deployment)


def arguments(settings: Settings, port: int, context: int) -> list[str]:
    """The server's arguments, those of `teacher_inference.extra_args` last, so that they win."""
    local = settings.teacher_inference
    address = {
        "--model": model_of(settings),
        "--served-model-name": local.model.name or settings.model.name,
        "--host": "127.0.0.1",
        "--port": port,
    }
    words = [str(word) for item in address.items() for word in item]
    words += model_arguments(settings, context)
    words.append("--enable-scale-out")  # opens the route that takes and gives token ids
    if device_of(settings.deployment) == "cpu":
        words.append("--enforce-eager")
    return [*words, *local.extra_args]


def model_of(settings: Settings) -> str:
    """The teacher's model as vLLM takes it: a directory, or a model id."""
    name = settings.teacher_inference.model.name or settings.model.name
    path = Path(name).expanduser()
    return str(path) if path.is_dir() else name


def model_arguments(settings: Settings, context: int) -> list[str]:
    """How vLLM computes the teacher, in a server or in process."""
    cpu = device_of(settings.deployment) == "cpu"
    dtype: str = settings.teacher_inference.dtype
    if dtype == "auto":
        dtype = "float32" if cpu else "bfloat16"
    options: dict[str, object] = {
        "--tensor-parallel-size": max(1, make_plan(settings).teacher_server),
        "--max-model-len": context,
        "--dtype": dtype,
        "--max-logprobs": max(MAX_LOGPROBS, settings.trainer.loss.most_top_k),
    }
    share = None if cpu else memory_share(settings, "teacher")
    if share is not None:
        options["--gpu-memory-utilization"] = share
    return [str(word) for item in options.items() for word in item]


def context_tokens(settings: Settings) -> int:
    """vLLM's context: twice the longest sample that was found, or all that the teacher has.

    vLLM keeps memory for one sequence of its whole context, and may not have it for the
    teacher's whole context.

    Raises:
        UserError: the teacher cannot score the student's tokens, or its context is too short.
    """
    student = load_student(settings)
    teacher = load_teacher(settings)
    check_compatible(student, teacher, settings.inference.sampling.max_completion)
    longest = load_student_info(settings).longest_sample
    if teacher.context_tokens < longest + 1:
        raise UserError(
            f"the context of the teacher {teacher.name!r} is {teacher.context_tokens} tokens",
            expected=f"at least {longest + 1}: a sample of up to {longest} tokens, prompt and "
            "completion, and one more that vLLM takes",
            next_step="Lower inference.sampling.max_completion, or set "
            'teacher_inference.engine = "transformers", which needs no more.',
        )
    return min(teacher.context_tokens, max(LEAST_CONTEXT, 2 * (longest + 1)))
