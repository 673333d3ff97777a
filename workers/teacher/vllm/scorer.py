"""Never run on a GPU. The teacher over vLLM in this process: arrays of its engine become scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np
from vllm import SamplingParams
from vllm.inputs.engine import tokens_input
from vllm.v1.engine import FinishReason

from onstream.workers.teacher.local_scorer import blind
from onstream.workers.teacher.scorer import ScoreRequest, Scores, sent_ids

if TYPE_CHECKING:
    from vllm.inputs.engine import EngineInput
    from vllm.v1.engine import EngineCoreOutput
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.outputs import LogprobsTensors

    from onstream.workers.teacher.request_images import RequestImages

FAILED = (FinishReason.ABORT, FinishReason.ERROR)


@dataclass
class PendingScore:
    """A request that vLLM has: the `at`-th of a call.

    `reads_cache` says whether keys and values of a sibling's prompt may be used.
    """

    at: int
    request: ScoreRequest
    reads_cache: bool
    tensors: LogprobsTensors | None = None


class VllmScorer:
    """Scores samples with vLLM's `prompt_logprobs`.

    vLLM computes the logprobs of a prompt's tokens only where it computes their hidden states, and
    so reads no cached prefix for such a request, unless it is told to. A sample needs those of its
    completion alone. So it is told to, and siblings share the blocks of their prompt. Where the
    cache held more than the prompt, the sample is asked again without it.

    Requests go to vLLM's engine, and its outputs are taken from there: its own output processor
    would make Python objects of every number.

    Args:
        vocabulary_size: how many tokens both the student and the teacher know.
        shares_prompts: whether the model keeps keys and values alone, which can be shared.
        images: those of prompts, where the student and the teacher read them.
    """

    def __init__(
        self,
        name: str,
        engine: LLMEngine,
        *,
        vocabulary_size: int,
        passes: int,
        shares_prompts: bool,
        images: RequestImages | None = None,
    ) -> None:
        self.name = name
        self.vocabulary_size = vocabulary_size
        self.passes = passes
        config = engine.vllm_config
        # vLLM generates one token, and takes no less.
        self.context_tokens = int(config.model_config.max_model_len) - 1
        self._most_logprobs = int(config.model_config.get_vocab_size()) - 1
        self._shares_prompts = shares_prompts and bool(config.cache_config.enable_prefix_caching)
        self._block_tokens = int(config.cache_config.block_size)
        self._engine: Any = engine
        self._tasks = engine.get_supported_tasks()
        self._numbers = count()
        self._images = images
        self._rendered: dict[bytes, EngineInput] = {}
        """Inputs with images, made when they were looked at."""

    def prefetch_images(self, request: ScoreRequest) -> None:
        """Begin to process the images of a request that will be scored soon."""
        if self._images is not None:
            self._images.prefetch(request.images)

    def image_problem(self, request: ScoreRequest) -> str | None:
        """Why `request` cannot be scored with all its images; None where it can."""
        if not request.images or self._images is None:
            return blind(request, self.name)
        if problem := self._images.problem_with(request):
            return problem
        [rendered] = self._engine.renderer.render_cmpl([self._images.prompt(request)])
        made = rendered["prompt_token_ids"]
        if list(made) != sent_ids(request):
            return (
                f"of a sample with {len(request.images)} images vLLM makes {len(made)} tokens "
                f"that are not the student's {request.tokens}"
            )
        self._rendered[_key(request)] = rendered
        return None

    def score(self, requests: Sequence[ScoreRequest], *, top_k: int) -> list[Scores]:
        """The scores of `requests`, in their order.

        Raises:
            RuntimeError: vLLM did not compute one.
        """
        k = min(top_k, self._most_logprobs)
        pending: dict[str, PendingScore] = {}
        for at, request in enumerate(requests):
            reads_cache = self._shares_prompts and len(request.prompt_ids) % self._block_tokens > 0
            self._send(PendingScore(at, request, reads_cache), k, pending)
        scores: dict[int, Scores] = {}
        while pending:
            for output in self._engine.engine_core.get_output().outputs:
                self._take(output, k, pending, scores)
        self._rendered.clear()
        return [scores[at] for at in range(len(requests))]

    def close(self) -> None:
        """End vLLM's processes, and the thread that processes images."""
        self._engine.engine_core.shutdown()
        if self._images is not None:
            self._images.close()

    def _send(self, one: PendingScore, k: int, pending: dict[str, PendingScore]) -> None:
        sampling = SamplingParams(
            max_tokens=1,
            temperature=1.0,
            prompt_logprobs=k,
            ignore_eos=True,
            detokenize=False,
            skip_reading_prefix_cache=not one.reads_cache,
        )
        asked = self._engine.input_processor.process_inputs(
            str(next(self._numbers)),
            self._input(one.request),
            sampling,
            supported_tasks=self._tasks,
        )
        self._engine.input_processor.assign_request_id(asked)
        pending[asked.request_id] = one
        self._engine.engine_core.add_request(asked)

    def _input(self, request: ScoreRequest) -> EngineInput:
        if request.images:
            return self._rendered[_key(request)]
        prompt: EngineInput = tokens_input(sent_ids(request))
        return prompt

    def _take(
        self,
        output: EngineCoreOutput,
        k: int,
        pending: dict[str, PendingScore],
        scores: dict[int, Scores],
    ) -> None:
        """Read what vLLM says of a request, or ask again where its cache held too much of it."""
        one = pending[output.request_id]
        if output.new_prompt_logprobs_tensors is not None:
            one.tensors = output.new_prompt_logprobs_tensors
        if output.finish_reason is None:
            return
        del pending[output.request_id]
        cached = output.prefill_stats.num_cached_tokens if output.prefill_stats else 0
        found = None
        if output.finish_reason not in FAILED and cached < len(one.request.prompt_ids):
            found = scores_of(one.tensors, one.request, k)
        if found is not None:
            scores[one.at] = found
        elif one.reads_cache:
            self._send(PendingScore(one.at, one.request, reads_cache=False), k, pending)
        else:
            raise RuntimeError(
                f"vLLM ended a request to score {one.request.tokens} tokens without their "
                f"logprobs ({output.finish_reason})"
            )


def scores_of(tensors: LogprobsTensors | None, request: ScoreRequest, k: int) -> Scores | None:
    """The scores in the last rows of `tensors`; None where they are not those of the completion.

    A row [1 + k] has a token of the prompt and the k likeliest ones in its place. The last row is
    the last token's; rows at the beginning may be missing, or hold nothing.
    """
    if tensors is None:
        return None
    tokens = len(request.completion_ids)
    ids = tensors.logprob_token_ids.numpy()[-tokens:]
    logprobs = tensors.logprobs.numpy()[-tokens:]
    if len(ids) != tokens or not np.array_equal(ids[:, 0], request.completion_ids):
        return None
    own = logprobs[:, 0].astype(np.float32)
    if k == 0:
        return Scores(own)
    return Scores(
        own, ids[:, 1 : k + 1].astype(np.int32), logprobs[:, 1 : k + 1].astype(np.float32)
    )


def _key(request: ScoreRequest) -> bytes:
    """What tells a request with images from others of a call."""
    ids = request.prompt_ids.tobytes() + b"/" + request.completion_ids.tobytes()
    return ids + "/".join(request.images).encode()
