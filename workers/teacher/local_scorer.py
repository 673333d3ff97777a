"""Never run on a GPU. The teacher in this process: a transformers model over packed batches.

Siblings share the computation of their prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel

from onstream.pipeline.errors import UserError
from onstream.pipeline.images import grey_image
from onstream.pipeline.images.feature_cache import FeatureCache, FetchImages, no_images
from onstream.pipeline.images.vision import Vision, load_vision
from onstream.pipeline.models.chat_template import too_long_teacher_prompt
from onstream.pipeline.models.forward import (
    NO_IMAGES,
    hidden_states,
    on_device,
    rows_for,
)
from onstream.pipeline.models.loading import load_model, resolve_device
from onstream.pipeline.models.logprobs import OutputHead, TokenLogprobs, token_logprobs
from onstream.pipeline.models.multimodal import Features
from onstream.pipeline.models.output_layer import head_of
from onstream.pipeline.models.packing import SharedPrefixRow
from onstream.pipeline.models.prompt_sharing import choose_attention, prepare
from onstream.pipeline.models.tokenizer import has_vision, load_configs
from onstream.pipeline.telemetry import get_logger
from onstream.settings.root import Settings
from onstream.workers.teacher.compatibility import (
    ModelInfo,
    check_compatible,
    load_student,
    load_teacher,
)
from onstream.workers.teacher.external.student_info import load_student_info
from onstream.workers.teacher.precision import teacher_dtype
from onstream.workers.teacher.scorer import ScoreRequest, Scores

PASSES_ON_CUDA = 4
CHECKED_SIZES = ((32, 32), (448, 336), (300, 900))
"""Width and height, in pixels, of the images that the processors are compared on."""


class LocalScorer:
    """Scores samples with `model`.

    Logits, the k likeliest tokens and the tail stay on the model's device; only the results leave
    it, in the form of records. On CUDA a call takes several forward passes, which are all begun
    before the results of the first are waited for.

    Args:
        vocabulary_size: how many entries of the model's output count. Models of one family pad
            theirs differently, and the student has no logit for a token beyond its own.
        max_batch_tokens: tokens of one forward pass.
        head_chunk: positions whose logits over the whole vocabulary exist at once.
        features: the images of prompts, as this model reads them; None for one that reads none.
    """

    def __init__(
        self,
        name: str,
        model: PreTrainedModel,
        *,
        context_tokens: int,
        vocabulary_size: int,
        max_batch_tokens: int,
        head_chunk: int,
        features: FeatureCache | None = None,
    ) -> None:
        self.name = name
        self.context_tokens = context_tokens
        self.vocabulary_size = vocabulary_size
        self.passes = PASSES_ON_CUDA if model.device.type == "cuda" else 1
        self._model = model
        self._head = _first_rows(head_of(model), vocabulary_size)
        self._max_batch_tokens = max_batch_tokens
        self._head_chunk = head_chunk
        self._features = features

    def prefetch_images(self, request: ScoreRequest) -> None:
        """Begin to process the images of a request that will be scored soon."""
        if self._features:
            self._features.prefetch(request.images)

    def image_problem(self, request: ScoreRequest) -> str | None:
        """Why `request` cannot be scored with all its images; None where it can."""
        if self._features is None:
            return blind(request, self.name)
        return self._features.problem_with(
            request.prompt_ids, request.completion_ids, request.images
        )

    def close(self) -> None:
        """End the thread that processes images."""
        if self._features:
            self._features.close()

    @torch.inference_mode()
    def score(self, requests: Sequence[ScoreRequest], *, top_k: int) -> list[Scores]:
        """The scores of `requests`, in their order.

        Raises:
            ValueError: a prompt or a completion is empty.
        """
        prompts = [request.prompt_ids for request in requests]
        completions = [request.completion_ids for request in requests]
        images = [request.images for request in requests]
        shown = {digest for request in requests for digest in request.images}
        features = self._features.get(shown) if self._features and shown else NO_IMAGES
        rows = rows_for(self._model, prompts, completions, images, self._max_batch_tokens)
        begun = [self._score_row(packed, features, top_k) for packed in rows]
        scores: dict[int, Scores] = {}
        for packed, scored in zip(rows, begun, strict=True):
            scores.update(zip(packed.sequences, _split(scored, packed.lengths), strict=True))
        return [scores[index] for index in range(len(requests))]

    def _score_row(self, packed: SharedPrefixRow, features: Features, top_k: int) -> TokenLogprobs:
        hidden = hidden_states(self._model, packed, features)
        targets = on_device(packed.targets, hidden.device)
        k = min(top_k, self.vocabulary_size - 1)  # the tail is never empty
        return token_logprobs(hidden, self._head, targets, top_k=k, chunk=self._head_chunk)


def blind(request: ScoreRequest, teacher: str) -> str | None:
    """Why a teacher that reads no images cannot score `request`; None where it has none."""
    if not request.images:
        return None
    count = len(request.images)
    return f"its prompt shows {count} images, and the teacher {teacher} reads none"


def _split(scored: TokenLogprobs, lengths: Sequence[int]) -> list[Scores]:
    """The scores of each of S completions of `lengths` [S] tokens.

    The fields hold those of all completions, one after the other.
    """
    ends = np.cumsum(lengths)[:-1]

    def pieces(field: Tensor, dtype: torch.dtype) -> list[npt.NDArray[Any]]:
        return np.split(field.to(dtype).cpu().numpy(), ends)

    logprobs = pieces(scored.sampled, torch.float32)
    if scored.top is None:
        return [Scores(own) for own in logprobs]
    top = (
        pieces(scored.top.ids, torch.int32),
        pieces(scored.top.logprobs, torch.float32),
        pieces(scored.top.tail, torch.float32),
    )
    return [Scores(*fields) for fields in zip(logprobs, *top, strict=True)]


def _first_rows(head: OutputHead, rows: int) -> OutputHead:
    """The output layer onto the first `rows` entries, in the same memory."""
    return head.with_weight(head.weight[:rows])


def load_local(settings: Settings, images: FetchImages = no_images) -> LocalScorer:
    """The teacher `teacher_inference.model.name`.

    Where none is named, the student's starting model.

    `images` gives the bytes of images by digest; by default there are none.

    Raises:
        UserError: there is no such model, or it cannot score this student's tokens, or not be read
            as `teacher_inference.attention` says.
    """
    local = settings.teacher_inference
    student = load_student(settings)
    teacher = load_teacher(settings)
    name = teacher.name
    check_compatible(student, teacher, settings.inference.sampling.max_completion)
    if settings.task.teacher_prompt.differs:
        check_longest_sample(settings, teacher)
    device = resolve_device(settings.deployment.device)
    hidden = getattr(load_configs(name)[0].get_text_config(), "hidden_size", 0)
    dtype = teacher_dtype(local.dtype, hidden, device)
    model = load_model(name, dtype=dtype, device=device).requires_grad_(False)
    reason = prepare(model)
    if reason:
        get_logger().warning(
            "shared prompts are scored once a rollout", teacher=name, reason=reason
        )
    choose_attention(model, local.attention, dtype, reason, "teacher_inference.attention")
    vision = load_vision(name) if has_vision(model.config) else None
    if vision and has_vision(load_configs(settings.model.name)[0]):
        check_image_tokens(load_vision(settings.model.name), vision, settings.model.name, name)
    return LocalScorer(
        name,
        model,
        context_tokens=teacher.context_tokens,
        vocabulary_size=min(student.vocabulary_size, teacher.vocabulary_size),
        max_batch_tokens=local.max_batch_tokens,
        head_chunk=local.head_chunk,
        features=FeatureCache(vision, images, settings.images.keep_bytes) if vision else None,
    )


def check_longest_sample(settings: Settings, teacher: ModelInfo) -> None:
    """Check that what the teacher reads, its own prompt and a completion, fits its context.

    Raises:
        UserError: one of the task's first problems does not, or the chat template refuses it.
    """
    longest = load_student_info(settings).longest_sample
    if longest > teacher.context_tokens:
        raise too_long_teacher_prompt(teacher.name, longest, teacher.context_tokens)


def check_image_tokens(
    student: Vision, teacher: Vision, student_name: str, teacher_name: str
) -> None:
    """Check that both processors put the same tokens into a prompt.

    Raises:
        UserError: they differ in the tokens, or their number, for an image of some size.
    """
    for width, height in CHECKED_SIZES:
        picture = grey_image(width, height)
        ours = student.features(picture).token_ids
        theirs = teacher.features(picture).token_ids
        if not np.array_equal(ours, theirs):
            raise UserError(
                f"of an image of {width} × {height} the processor of {student_name} makes "
                f"{len(ours)} tokens, {_tokens_shown(ours)}, "
                f"and that of {teacher_name} {len(theirs)}, {_tokens_shown(theirs)}",
                expected="processors that put the same tokens into a prompt",
                next_step="Use a teacher of the student's family, with the same sizes in "
                "preprocessor_config.json.",
            )


def _tokens_shown(ids: np.ndarray[tuple[int, ...], np.dtype[np.int32]]) -> str:
    kinds = ", ".join(map(str, dict.fromkeys(ids.tolist())))
    return f"of the ids {kinds}"
