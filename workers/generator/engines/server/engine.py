"""The engine that has rollouts written by vLLM servers, wherever they run, and replaces their
weights over HTTP.
"""

from __future__ import annotations

import queue
from collections.abc import Collection, Sequence
from concurrent.futures import Future, wait
from functools import partial
from typing import TYPE_CHECKING, Any

from onstream.pipeline.errors import UserError
from onstream.pipeline.http import EventLoopThread, RequestRefused
from onstream.pipeline.images.vllm_prompts import VllmPrompts
from onstream.pipeline.weights import LoadedPolicy
from onstream.settings.root import Settings
from onstream.workers.generator.engines.base import Completion, GenerationRequest, require_possible
from onstream.workers.generator.engines.server.check import TEXT, ServerCheck
from onstream.workers.generator.engines.server.policy_files import ServerFiles
from onstream.workers.generator.engines.server.server_group import ServerGroup
from onstream.workers.generator.engines.vllm.request import VllmRequest

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SLICE_S = 0.02
LEAVE_S = 10.0


class ServerEngine:
    """An `Engine` over the servers of `inference.client`. `config` is the model's; `tried` a
    request with a picture, if it reads any.

    Requests and updates happen in a thread of its own: a step hands over what has come since the
    last one, waiting for a moment. After the first, a load returns at once; the servers go on with
    what they had until they have read the new weights.

    Raises:
        UserError: no server answers, or one that answers cannot be used.
    """

    def __init__(
        self,
        settings: Settings,
        tokenizer: Any,
        stop_ids: Collection[int],
        config: PretrainedConfig,
        *,
        tried: GenerationRequest | None = None,
    ) -> None:
        client = settings.inference.client
        inference = settings.inference
        if not client.base_url:
            raise UserError(
                'inference.engine = "server" without inference.client.base_url',
                expected="the address of a vLLM server of the student",
                next_step='Set inference.client.base_url = ["http://…:8000"], or let `onstream up` start the server.',
            )
        model = client.model or settings.model.name
        text_ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
        sent = VllmPrompts(config)
        check = ServerCheck(client, model, text_ids, inference.sampling.max_completion, sent, tried)
        self._context: int | None = getattr(
            config.get_text_config(), "max_position_embeddings", None
        )
        self._files = ServerFiles(client.weights_dir, settings.run.name)
        self._background = EventLoopThread()
        self._written: queue.SimpleQueue[tuple[VllmRequest, Future[None]]] = queue.SimpleQueue()
        self._active = 0
        self._loading: Future[None] | None = None
        self._fleet = ServerGroup(client, model, inference.on_new_weights, stop_ids, check, sent)
        try:
            self._background.run(self._fleet.pool.open(patient=False))
        except BaseException:
            self.close()
            raise

    @property
    def max_context(self) -> int | None:
        told = [
            server.context_tokens
            for server in self._fleet.pool.endpoints
            if server.context_tokens is not None
        ]
        bounds = [*told, *([self._context] if self._context is not None else [])]
        return min(bounds, default=None)

    @property
    def slots(self) -> int:
        return self._fleet.pool.capacity

    @property
    def replicas(self) -> int:
        """The servers. One that is away is not asked in particular: it writes nothing either."""
        return len(self._fleet.pool.endpoints)

    @property
    def active(self) -> int:
        return self._active

    @property
    def problem(self) -> str:
        return self._fleet.pool.problem

    @property
    def version(self) -> int:
        return self._fleet.version

    def add(self, requests: Sequence[GenerationRequest]) -> None:
        for request in requests:
            require_possible(request, self.max_context)
            writing = VllmRequest(request)
            done = self._background.submit(self._fleet.write(writing))
            done.add_done_callback(partial(self._arrive, writing))
            self._active += 1

    def step(self) -> list[Completion]:
        """What the servers have finished.

        Raises:
            UserError: another generator has taken a server, or a server refuses a request.
        """
        if self._fleet.displaced is not None:
            raise self._fleet.displaced
        self._require_loading()
        return [self._completion(writing, done) for writing, done in self._arrived()]

    def load(self, policy: LoadedPolicy) -> None:
        self._require_loading()
        path = self._files.put(policy)
        first = self._loading is None
        self._loading = self._background.submit(self._fleet.load(policy, path))
        if first:
            self._loading.result()

    def close(self) -> None:
        """Let an update end, so that no server stays paused, and drop the requests, which the
        servers then abort.
        """
        if self._loading is not None:
            wait([self._loading], timeout=LEAVE_S)
        self._background.stop(self._fleet.pool.close)
        self._files.close()

    def _require_loading(self) -> None:
        """Raise what ended an update in a way that nobody foresaw; the fleet itself deals with
        servers that fail.
        """
        if self._loading is not None and self._loading.done():
            self._loading.result()

    def _arrive(self, writing: VllmRequest, done: Future[None]) -> None:
        self._written.put((writing, done))

    def _arrived(self) -> list[tuple[VllmRequest, Future[None]]]:
        arrived: list[tuple[VllmRequest, Future[None]]] = []
        try:
            while self._active > len(arrived):
                arrived.append(
                    self._written.get_nowait() if arrived else self._written.get(timeout=SLICE_S)
                )
        except queue.Empty:
            pass
        return arrived

    def _completion(self, writing: VllmRequest, done: Future[None]) -> Completion:
        self._active -= 1
        try:
            done.result()
        except RequestRefused as refusal:
            raise UserError(
                f"a server of the student refuses a request: {refusal}",
                expected="a server that writes what fits its context",
                next_step="Look into the server's log; inference.client.base_url says which servers are asked.",
            ) from refusal
        return writing.completion()
