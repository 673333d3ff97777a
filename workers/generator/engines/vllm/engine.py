"""The engine over vLLM: its own processes write, and a thread of this one collects the results."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from vllm import SamplingParams
from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest
from vllm.inputs.engine import tokens_input
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from onstream.pipeline.http import EventLoopThread
from onstream.pipeline.images.vllm_prompts import VllmPrompts
from onstream.pipeline.models.weight_shapes import WeightShapes
from onstream.pipeline.weights import LoadedPolicy, WeightsError
from onstream.workers.generator.engines.base import Completion, GenerationRequest
from onstream.workers.generator.engines.vllm.extension import READING, READY, RECEIVED
from onstream.workers.generator.engines.vllm.request import VllmRequest, input_of
from onstream.workers.generator.student import require_possible

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.outputs import CompletionOutput

OnNewWeights = Literal["recompute", "keep", "wait", "abort"]
STEP_S = 0.02
STAGED_POLL_S = 0.002
CLOSE_S = 30.0
TEXT_REQUEST = GenerationRequest(0, np.zeros(4, dtype=np.int32), max_tokens=3, seed=0)
PAUSES: dict[OnNewWeights, tuple[str, bool]] = {
    "recompute": ("keep", True),
    "keep": ("keep", False),
    "wait": ("wait", True),
    "abort": ("abort", True),
}
"""What vLLM's pause does with running requests, and whether it clears the caches.

They are those of keys and values, of prefixes, and of images.
"""


@dataclass(frozen=True)
class PolicyUpdate:
    """A version to load, and the path where vLLM's processes find it.

    `policy` is kept for as long as they may read its file: the file is removed with it.
    """

    number: int
    digest: str
    path: str
    policy: LoadedPolicy | None = None


class VllmEngine:
    """An `Engine` over vLLM's AsyncLLM.

    `add` hands requests to vLLM at once, which decodes `slots` of them and queues the others.
    `step` takes what is finished, and waits a moment where nothing is. `load` stages the weights
    while requests go on, and pauses them only for the switch. It returns after the switch, except
    in the mode `wait`.

    Args:
        config: from `startup.configure`.
        stop_ids: a completion ends with any of these.
        shapes: of the student's weights; others are refused before vLLM gets them.
        on_new_weights: what becomes of running completions when weights are loaded. It is also an
            attribute, to change between loads. With `keep`, vLLM must not cache prefixes: new
            completions would begin with those of old weights.
        first: the first request, to test vLLM with; with an image for a model that reads images.

    Raises:
        UserError: vLLM makes other tokens of an image than the student's processor.
        Exception: of any other kind; vLLM did not start.
    """

    def __init__(
        self,
        config: VllmConfig,
        stop_ids: Collection[int],
        shapes: WeightShapes,
        *,
        on_new_weights: OnNewWeights = "recompute",
        first: GenerationRequest | None = None,
    ) -> None:
        self._stop_ids = frozenset(stop_ids)
        self._shapes = shapes
        self.on_new_weights = on_new_weights
        self._slots = int(
            config.scheduler_config.max_num_seqs * config.parallel_config.data_parallel_size
        )
        self._gpus = int(config.parallel_config.world_size_across_dp)
        self._replicas = int(config.parallel_config.data_parallel_size)
        self._context = int(config.model_config.max_model_len)
        self._active = 0
        self._finished = SimpleQueue[VllmRequest | BaseException]()
        self._version = 0
        self._target: PolicyUpdate | None = None
        self._switching: Future[PolicyUpdate] | None = None
        self._vllm_prompts = VllmPrompts(config.model_config.hf_config)
        self._background = EventLoopThread()
        self._llm: Any = None  # an AsyncLLM, once it has started
        try:
            self._unpaused = self._background.run(_set_event())
            self._llm = self._background.run(_start(config))
            self._write_first(first or TEXT_REQUEST)
        except BaseException:
            self.close()
            raise

    @property
    def max_context(self) -> int:
        return self._context

    @property
    def slots(self) -> int:
        return self._slots

    @property
    def replicas(self) -> int:
        return self._replicas

    @property
    def problem(self) -> str:
        return ""

    @property
    def active(self) -> int:
        return self._active

    @property
    def version(self) -> int:
        return self._version

    def add(self, requests: Sequence[GenerationRequest]) -> None:
        for request in requests:
            require_possible(request, self._context)
        self._active += len(requests)
        if requests:
            self._background.submit(self._write_all([VllmRequest(request) for request in requests]))

    def step(self) -> list[Completion]:
        if self._switching is not None and self._switching.done():
            self._switched()
        if not self._active:
            return []
        finished: list[Completion] = []
        with suppress(Empty):
            finished.append(self._take(timeout_s=STEP_S))
            while True:
                finished.append(self._take(timeout_s=0.0))
        return finished

    def load(self, policy: LoadedPolicy) -> None:
        if misfit := self._shapes.misfit(policy.shapes):
            raise WeightsError(misfit)
        try:
            path = str(policy.file())
        except OSError as error:
            raise WeightsError(
                f"version {policy.number} cannot be written for vLLM to read: {error}"
            ) from error
        self._replace_weights(PolicyUpdate(policy.number, policy.digest, path, policy))

    def load_received(self, number: int, digest: str) -> None:
        """Continue with weights that the processes have received from the trainer, like `load`.

        Raises:
            WeightsError: one of them does not have these; the engine goes on with those it has.
        """
        self._replace_weights(PolicyUpdate(number, digest, RECEIVED))

    @property
    def gpus(self) -> int:
        """Processes that compute, each on a GPU of its own."""
        return self._gpus

    def misfit(self, shapes: Mapping[str, tuple[int, ...]]) -> str:
        """Why weights of these shapes are not this model's; empty where they are."""
        return self._shapes.misfit(shapes)

    def ask_processes(self, method: str, *args: str) -> list[str]:
        """What each process returns from a method of `extension.Extension`."""
        return list(self._background.run(self._llm.collective_rpc(method, args=args)))

    def _replace_weights(self, target: PolicyUpdate) -> None:
        self._stage(target.path, target.digest)
        # A switch under way may not have read `_target` yet, and takes this one then.
        self._target = target
        if self._switching is None:
            self._switching = self._background.submit(self._switch())
        if self.on_new_weights != "wait":
            self._switched()

    def close(self) -> None:
        async def end() -> None:
            if self._llm is not None:
                self._llm.shutdown()  # in this thread, which vLLM's sockets belong to

        self._background.stop(end, within_s=CLOSE_S)  # what runs is cancelled, and so aborted
        self._llm = None  # or it would be shut down again while the interpreter ends

    def _write_first(self, request: GenerationRequest) -> None:
        """Write a completion: vLLM fails for some models, or reads their images otherwise, only
        when it computes.
        """
        self.add([request])
        while self._active:
            self.step()

    def _take(self, *, timeout_s: float) -> Completion:
        """The next finished completion.

        Raises:
            Empty: there is none within `timeout_s`.
            Exception: vLLM failed; the engine cannot go on.
        """
        if timeout_s:
            finished = self._finished.get(timeout=timeout_s)
        else:
            finished = self._finished.get_nowait()
        if isinstance(finished, BaseException):
            raise finished
        self._active -= 1
        return finished.completion()

    def _stage(self, path: str, digest: str) -> None:
        """Have every process of vLLM read and check the weights, while requests go on.

        Raises:
            WeightsError: one of them cannot; nothing was touched.
        """
        self.ask_processes("onstream_stage", path, digest)
        states = self.ask_processes("onstream_staged")
        while READING in states:
            time.sleep(STAGED_POLL_S)
            states = self.ask_processes("onstream_staged")
        if problems := [state for state in states if state != READY]:
            raise WeightsError(problems[0])

    def _switched(self) -> None:
        """Wait for the switch, and begin another if newer weights came meanwhile."""
        assert self._switching is not None
        loaded = self._switching.result()
        self._version = loaded.number
        self._switching = None
        if self._target is not loaded:
            self._switching = self._background.submit(self._switch())

    async def _write_all(self, requests: Sequence[VllmRequest]) -> None:
        await asyncio.gather(*(self._write(request) for request in requests))

    async def _write(self, request: VllmRequest) -> None:
        try:
            while request.finish_reason is None:
                await self._unpaused.wait()
                output = await self._generate(request)
                request.take(*_parts(output))
        except Exception as error:  # raised by `step`, where the worker's loop sees it
            self._finished.put(error)
        else:
            self._finished.put(request)

    async def _generate(self, request: VllmRequest) -> CompletionOutput:
        """What vLLM writes until the request is finished, or aborted."""
        sampling = SamplingParams(
            **request.sampling_params(self._stop_ids), output_kind=RequestOutputKind.FINAL_ONLY
        )
        asked = request.request
        if asked.images:
            prompt = input_of(request, self._vllm_prompts, self._llm.renderer)
        else:
            prompt = tokens_input(request.prompt_ids)
        answers = self._llm.generate(
            prompt, sampling, str(asked.key), data_parallel_rank=asked.replica
        )
        [answer] = [one async for one in answers]
        return answer.outputs[0]

    async def _switch(self) -> PolicyUpdate:
        """Pause, replace the weights by those staged last, and go on with them.

        If this fails halfway, vLLM stays paused for good: it may have some of both weights.
        """
        mode, clear_cache = PAUSES[self.on_new_weights]
        # Requests that vLLM aborts for the pause are not asked again before it is over.
        self._unpaused.clear()
        await self._llm.pause_generation(mode=mode, clear_cache=clear_cache)
        if not clear_cache:
            # What the old vision tower made of images is not for new completions, even with `keep`.
            await self._llm.reset_encoder_cache()
        # Read only now: a newer version may have been staged while vLLM paused.
        assert self._target is not None
        target = self._target
        await self._llm.start_weight_update()
        await self._llm.update_weights(
            WeightTransferUpdateRequest({"path": target.path, "digest": target.digest})
        )
        await self._llm.finish_weight_update(str(target.number))
        await self._llm.resume_generation()
        self._unpaused.set()
        return target


async def _start(config: VllmConfig) -> AsyncLLM:
    """vLLM with all its processes, in the running event loop.

    What it writes before the first update is of version 0.
    """
    llm = AsyncLLM.from_vllm_config(config, disable_log_stats=True)
    await llm.update_weight_version("0")
    return llm


async def _set_event() -> asyncio.Event:
    event = asyncio.Event()
    event.set()
    return event


def _parts(
    output: CompletionOutput,
) -> tuple[list[int], list[float], list[tuple[int, int, int]], str]:
    """The arguments of `VllmRequest.take`.

    A request that was aborted before its first token has neither logprobs nor versions.
    """
    tokens = list(output.token_ids)
    positions: list[Any] = output.logprobs or []
    logprobs = [position[token].logprob for position, token in zip(positions, tokens, strict=True)]
    spans = [(int(span.version), span.start, span.end) for span in output.weight_versions or []]
    return tokens, logprobs, spans, output.finish_reason or ""
