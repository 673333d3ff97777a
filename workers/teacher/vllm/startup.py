"""Never run on a GPU. How vLLM is started in a `teacher` worker: its arguments, start-up errors."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from onstream.pipeline.errors import UserError
from onstream.pipeline.images.feature_cache import FetchImages, no_images
from onstream.pipeline.images.vision import load_vision
from onstream.pipeline.models.tokenizer import has_states, has_vision, load_configs
from onstream.pipeline.vllm_process import prepare_process, reason_of
from onstream.settings.devices import device_of
from onstream.settings.engines import IN_PROCESS
from onstream.settings.root import Settings
from onstream.workers.teacher.compatibility import load_student, load_teacher
from onstream.workers.teacher.local_scorer import check_image_tokens
from onstream.workers.teacher.request_images import RequestImages
from onstream.workers.teacher.scorer import ScoreRequest
from onstream.workers.teacher.server_command import context_tokens, model_arguments, model_of

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine

    from onstream.workers.teacher.vllm.scorer import VllmScorer

PASSES = 4
"""Forward passes of tokens that a call is given: vLLM computes one while this process reads the
scores of another.
"""

TRIAL = ScoreRequest(np.zeros(2, dtype=np.int32), np.zeros(2, dtype=np.int32))
"""Asked before the worker is ready: vLLM fails for some models only when it computes."""


def load_vllm(settings: Settings, images: FetchImages = no_images) -> VllmScorer:
    """The teacher `teacher_inference.model.name` on vLLM, in this process and its children.

    `images` gives the bytes of images by digest; by default there are none.

    Raises:
        UserError: the teacher cannot score this student's tokens, vLLM does not take it, cannot
            compute it, or is not installed.
    """
    prepare_process(
        device_of(settings.deployment),
        alone=True,
        setting="teacher_inference.engine",
        value=IN_PROCESS,
    )
    context = context_tokens(settings)  # checks the teacher first
    student = load_student(settings)
    teacher = load_teacher(settings)
    config, _ = load_configs(teacher.name)
    reads_images = _check_images(settings, teacher.name)
    words = engine_arguments(settings, context, images=reads_images)
    engine = _open_engine(teacher.name, words)
    # Imported only now: importing vLLM reads the environment that was just prepared.
    from onstream.workers.teacher.vllm.scorer import VllmScorer

    student_config, _ = load_configs(settings.model.name)
    scorer = VllmScorer(
        teacher.name,
        engine,
        vocabulary_size=min(student.vocabulary_size, teacher.vocabulary_size),
        passes=PASSES,
        shares_prompts=not has_states(config),
        images=RequestImages(settings, student_config, images) if reads_images else None,
    )
    try:
        scorer.score([TRIAL], top_k=settings.trainer.loss.most_top_k)
    except Exception as error:  # of whatever kind: vLLM failed, or its processes ended
        scorer.close()
        raise UserError(
            f"vLLM cannot compute the teacher {teacher.name}: {reason_of(error)}",
            expected="a model that vLLM has kernels for",
            next_step="Choose another teacher_inference.dtype, or teacher_inference.engine = "
            '"transformers".',
        ) from error
    return scorer


def engine_arguments(settings: Settings, context: int, *, images: bool) -> list[str]:
    """The engine's arguments, those of `teacher_inference.extra_args` last, so that they win.

    `images` says whether the student and the teacher read images.
    """
    local = settings.teacher_inference
    tokens = local.max_batch_tokens
    words = [
        *("--model", model_of(settings)),
        *model_arguments(settings, context),
        *("--max-num-batched-tokens", str(tokens)),
        *("--max-num-seqs", str(min(local.max_in_flight, tokens))),
        "--disable-log-stats",
    ]
    if device_of(settings.deployment) == "cpu":
        words += ["--enforce-eager", "--distributed-executor-backend", "uni"]
    if images:
        limits = {"image": settings.images.max_per_prompt, "video": 0}
        words += ["--limit-mm-per-prompt", json.dumps(limits)]
        # Inputs are made before it is known whether they will be sent, which its cache does not
        # allow.
        words += ["--mm-processor-cache-gb", "0"]
    else:
        words.append("--skip-tokenizer-init")
    return [*words, *local.extra_args]


def _check_images(settings: Settings, teacher: str) -> bool:
    """Whether the student and the teacher read images.

    Raises:
        UserError: they make other tokens of them.
    """
    student = settings.model.name
    if not all(has_vision(load_configs(name)[0]) for name in (student, teacher)):
        return False
    check_image_tokens(load_vision(student), load_vision(teacher), student, teacher)
    return True


def _open_engine(name: str, words: list[str]) -> LLMEngine:
    """vLLM with the model of the teacher called `name`.

    Raises:
        UserError: vLLM does not take an argument or the model, or did not start with it.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm.v1.engine.llm_engine import LLMEngine

    def refuse(reason: str) -> NoReturn:
        raise _not_taken(name, words, reason)

    parser: Any = EngineArgs.add_cli_args(FlexibleArgumentParser(exit_on_error=False))
    parser.error = refuse
    try:
        given = EngineArgs.from_cli_args(parser.parse_args(words))
        config = given.create_engine_config()
    except UserError:
        raise
    except Exception as error:  # of whatever kind: nothing has been started
        raise _not_taken(name, words, reason_of(error)) from error
    try:
        return LLMEngine.from_vllm_config(config, disable_log_stats=True)
    except Exception as error:  # of whatever kind: vLLM's processes ended
        raise UserError(
            f"vLLM did not start with the teacher {name}: {reason_of(error)}",
            expected="an engine that loads the model and finds room for its cache",
            next_step="vLLM's own lines above say why. Where it is memory, lower "
            "teacher_inference.max_batch_tokens or inference.sampling.max_completion, or give it "
            "more by deployment.gpu_memory_shares.teacher (on a CPU by the variable "
            "VLLM_CPU_KVCACHE_SPACE, in GiB).",
        ) from error


def _not_taken(name: str, words: list[str], reason: str) -> UserError:
    return UserError(
        f"vLLM does not take the teacher {name} with {' '.join(words[2:])}: {reason}",
        expected="a model and arguments that vLLM supports",
        next_step="Correct teacher_inference.extra_args, or set "
        'teacher_inference.engine = "transformers".',
    )
