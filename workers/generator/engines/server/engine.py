"""The engine over vLLM servers, wherever they run, whose weights it replaces over HTTP."""

from __future__ import annotations

import contextlib
import os
import queue
import secrets
from collections import deque
from collections.abc import Collection, Sequence
from concurrent.futures import Future, wait
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onstream.pipeline.errors import UserError
from onstream.pipeline.http import EventLoopThread, RequestRefused
from onstream.pipeline.images.vllm_prompts import VllmPrompts
from onstream.pipeline.weights import LoadedPolicy, WeightsError
from onstream.settings.root import Settings
from onstream.workers.generator.engines.base import Completion, GenerationRequest
from onstream.workers.generator.engines.server.check import TEXT, ServerCheck
from onstream.workers.generator.engines.server.server_group import ServerGroup
from onstream.workers.generator.engines.vllm.request import VllmRequest
from onstream.workers.generator.student import StudentModel, require_possible

if TYPE_CHECKING:
    from transformers import PretrainedConfig

POLL_S = 0.02
CLOSE_S = 10.0
KEPT_FILES = 2
"""Versions whose files stay: the newest, and the one before, which a slow server may still read."""


def open_engine(student: StudentModel) -> ServerEngine:
    """The engine over the servers of `inference.client`.

    Raises:
        UserError: no server answers, or one that answers cannot be used.
    """
    return ServerEngine(
        student.settings,
        student.tokenizer,
        student.stop_ids,
        student.config,
        image_request=student.test_request(),
    )


class ServerEngine:
    """An `Engine` over the servers of `inference.client`.

    Requests and updates run in a thread of its own. A step hands over what has come since the last
    one, waiting for a moment. The first load waits for the servers; later ones return at once, and
    the servers go on with their weights until they have read the new ones.

    Args:
        settings: of the run.
        tokenizer: the student's.
        stop_ids: a completion ends with any of these.
        config: the model's.
        image_request: a request with an image, if the student reads any.

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
        image_request: GenerationRequest | None = None,
    ) -> None:
        client = settings.inference.client
        inference = settings.inference
        if not client.base_url:
            raise UserError(
                'inference.engine = "server" without inference.client.base_url',
                expected="the address of a vLLM server of the student",
                next_step='Set inference.client.base_url = ["http://…:8000"], '
                "or let `onstream up` start the server.",
            )
        model = client.model or settings.model.name
        vllm_prompts = VllmPrompts(config)
        check = ServerCheck(
            client=client,
            model=model,
            text_ids=tokenizer(TEXT, add_special_tokens=False)["input_ids"],
            max_completion=inference.sampling.max_completion,
            vllm_prompts=vllm_prompts,
            image_request=image_request,
        )
        self._context: int | None = getattr(
            config.get_text_config(), "max_position_embeddings", None
        )
        self._files = ServerFiles(client.weights_dir, settings.run.name)
        self._background = EventLoopThread()
        self._finished: queue.SimpleQueue[tuple[VllmRequest, Future[None]]] = queue.SimpleQueue()
        self._active = 0
        self._loading: Future[None] | None = None
        self._servers = ServerGroup(
            client, model, inference.on_new_weights, stop_ids, check, vllm_prompts
        )
        try:
            self._background.run(self._servers.pool.open(patient=False))
        except BaseException:
            self.close()
            raise

    @property
    def max_context(self) -> int | None:
        bounds = [server.context_tokens for server in self._servers.pool.endpoints]
        known = [bound for bound in (*bounds, self._context) if bound is not None]
        return min(known, default=None)

    @property
    def slots(self) -> int:
        return self._servers.pool.capacity

    @property
    def replicas(self) -> int:
        """The servers. A request for one that is down goes to another: it writes nothing itself."""
        return len(self._servers.pool.endpoints)

    @property
    def active(self) -> int:
        return self._active

    @property
    def problem(self) -> str:
        return self._servers.pool.problem

    @property
    def version(self) -> int:
        return self._servers.version

    def add(self, requests: Sequence[GenerationRequest]) -> None:
        for request in requests:
            require_possible(request, self.max_context)
            vllm_request = VllmRequest(request)
            done = self._background.submit(self._servers.write(vllm_request))
            done.add_done_callback(partial(self._put_finished, vllm_request))
            self._active += 1

    def step(self) -> list[Completion]:
        """What the servers have finished.

        Raises:
            UserError: another generator has taken a server, or a server refuses a request.
        """
        if self._servers.displaced is not None:
            raise self._servers.displaced
        self._raise_failed_update()
        return [self._completion(request, done) for request, done in self._take_finished()]

    def load(self, policy: LoadedPolicy) -> None:
        self._raise_failed_update()
        path = self._files.put(policy)
        first = self._loading is None
        self._loading = self._background.submit(self._servers.load(policy, path))
        if first:
            self._loading.result()

    def close(self) -> None:
        """Let an update end, so that no server stays paused, and drop the requests.

        The servers abort requests whose connection is closed.
        """
        if self._loading is not None:
            wait([self._loading], timeout=CLOSE_S)
        self._background.stop(self._servers.pool.close)
        self._files.close()

    def _raise_failed_update(self) -> None:
        """Raise what ended an update unexpectedly; a server that fails is no such reason."""
        if self._loading is not None and self._loading.done():
            self._loading.result()

    def _put_finished(self, request: VllmRequest, done: Future[None]) -> None:
        self._finished.put((request, done))

    def _take_finished(self) -> list[tuple[VllmRequest, Future[None]]]:
        """All that is finished. Waits a moment where nothing is."""
        taken: list[tuple[VllmRequest, Future[None]]] = []
        with contextlib.suppress(queue.Empty):
            if self._active:
                taken.append(self._finished.get(timeout=POLL_S))
            while self._active > len(taken):
                taken.append(self._finished.get_nowait())
        return taken

    def _completion(self, request: VllmRequest, done: Future[None]) -> Completion:
        self._active -= 1
        try:
            done.result()
        except RequestRefused as refusal:
            raise UserError(
                f"a server of the student refuses a request: {refusal}",
                expected="a server that writes what fits its context",
                next_step="Look into the server's log; "
                "inference.client.base_url says which servers are asked.",
            ) from refusal
        return request.completion()


class ServerFiles:
    """Policy versions as files in `directory`, which the servers share.

    None: among the temporary files, for servers on this machine.
    """

    def __init__(self, directory: Path | None, run: str) -> None:
        self._directory = directory
        self._prefix = f"onstream-{run}-{secrets.token_hex(4)}"
        self._files: deque[Path] = deque()  # two for each version: unfinished, and finished

    def put(self, policy: LoadedPolicy) -> Path:
        """A file with the weights of `policy`. A temporary one is removed with `policy`.

        Raises:
            WeightsError: it cannot be written.
        """
        try:
            if self._directory is None:
                return policy.file()
            return self._write(self._directory, policy)
        except OSError as error:
            raise WeightsError(
                f"version {policy.number} cannot be put where the servers read it: {error}"
            ) from error

    def close(self) -> None:
        """Remove all files."""
        self._remove_oldest(keep=0)

    def _write(self, directory: Path, policy: LoadedPolicy) -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"{self._prefix}-{policy.number:06d}-{policy.digest[:12]}.safetensors"
        unfinished = path.with_suffix(".unfinished")
        if path not in self._files:
            self._files += [unfinished, path]
        unfinished.write_bytes(policy.data.data)
        os.replace(unfinished, path)
        self._remove_oldest(keep=2 * KEPT_FILES)
        return path

    def _remove_oldest(self, *, keep: int) -> None:
        while len(self._files) > keep:
            with contextlib.suppress(FileNotFoundError):
                self._files.popleft().unlink()
