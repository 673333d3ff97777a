"""The vLLM servers of the student, all at one policy version: one that is not at it gets no
requests.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Awaitable, Callable, Collection
from pathlib import Path
from typing import get_args

from onstream.pipeline.errors import Exit, UserError
from onstream.pipeline.http import (
    BadReply,
    EndpointError,
    EndpointFault,
    EndpointPool,
    RequestRefused,
)
from onstream.pipeline.images.vllm_prompts import VllmPrompts
from onstream.pipeline.records import FinishReason
from onstream.pipeline.weights import LoadedPolicy
from onstream.settings.sections.client import StudentClientSettings
from onstream.workers.generator.engines.server.student_server import (
    OnNewWeights,
    PartialCompletion,
    ServerUpdate,
    StudentServer,
)
from onstream.workers.generator.engines.vllm.images import fields_of, require_same_tokens
from onstream.workers.generator.engines.vllm.request import ABORTED, VllmRequest

SECTION = "inference"
ENDS = (ABORTED, *get_args(FinishReason))
LABEL = re.compile(r"(?P<number>\d+)\.(?P<digest>[0-9a-f]{12})\.(?P<owner>[0-9a-f]{8})")


class ServerGroup:
    """For one event loop alone. `model` is the student's name at the servers, `check` what must
    hold of one before it is used.

    A server belongs to one generator: the one whose name is in the label of its weights. A
    generator that starts takes its servers over, since the one before it may be dead; one that
    finds another's label on a server of its own stops (`displaced`).

    `version` is the one that the next request is written with; −1 before the first.
    """

    def __init__(
        self,
        client: StudentClientSettings,
        model: str,
        on_new_weights: OnNewWeights,
        stop_ids: Collection[int],
        check: Callable[[StudentServer], Awaitable[None]],
        sent: VllmPrompts,
    ) -> None:
        self._sent = sent
        self._model = model
        self._on_new_weights = on_new_weights
        self._stop_ids = stop_ids
        self._check = check
        self.pool = EndpointPool(
            client,
            StudentServer,
            model=model,
            section=SECTION,
            check=self._admit,
            conclusive=True,
            role="student",
        )
        self.version = -1
        self.displaced: UserError | None = None
        self._owner = secrets.token_hex(4)
        self._target: ServerUpdate | None = None
        self._renewing: asyncio.Task[None] | None = None

    async def write(self, writing: VllmRequest) -> None:
        """Have `writing` finished; returns when it is, however long no server is there.

        Raises:
            RequestRefused: a server will not write it.
            UserError: a server makes other tokens of its images than the student's processor.
        """
        replica = writing.request.replica
        of = None if replica is None else self.pool.endpoints[replica]
        while writing.finish_reason is None:
            try:
                answered = await self.pool.ask(lambda server: self._piece(server, writing), of)
            except RequestRefused as refusal:
                if (
                    refusal.status is None
                ):  # it failed often while others were answered; nothing is wrong with it itself
                    continue
                raise
            piece = answered.answer
            versions = [(_number(span.version), span.start, span.end) for span in piece.labels]
            writing.take(piece.token_ids, piece.logprobs, versions, piece.finish_reason)

    async def load(self, policy: LoadedPolicy, path: Path) -> None:
        """Have `policy`, of which `path` is a file, on every server that is there; those that fail
        get no requests until they have it.

        Returns when it is so, or a newer version came meanwhile.
        """
        self._target = ServerUpdate(
            policy, path, f"{policy.number}.{policy.digest[:12]}.{self._owner}"
        )
        if self._renewing is None or self._renewing.done():
            self._renewing = asyncio.create_task(self._renew())
        await asyncio.shield(self._renewing)

    async def _piece(self, server: StudentServer, writing: VllmRequest) -> PartialCompletion:
        """What `server` writes next. Its prefix cache is told apart by version: no keys and values
        of another one are found there.
        """
        body = {
            "model": self._model,
            "token_ids": writing.prompt_ids,
            "sampling_params": writing.sampling(self._stop_ids),
            "cache_salt": server.label,
        }
        if writing.request.images:
            body |= fields_of(writing, self._sent)
        piece = await server.generate(body)
        if writing.request.images:
            require_same_tokens(piece.prompt_ids, writing)
        for span in piece.labels:
            if not self._is_ours(span.version):
                raise self._disowned(server, span.version)
        if piece.finish_reason not in ENDS:
            raise BadReply(f"an answer that ended by {piece.finish_reason!r}")
        return piece

    async def _renew(self) -> None:
        loaded: ServerUpdate | None = None
        while (target := self._target) is not None and loaded != target:
            await asyncio.gather(
                *(
                    self._renew_one(server, target)
                    for server in self.pool.endpoints
                    if not server.down
                )
            )
            self.version = target.policy.number
            loaded = target

    async def _renew_one(self, server: StudentServer, target: ServerUpdate) -> None:
        try:
            await self._bring(server)
        except EndpointError as error:
            self.pool.mark_down(
                server, f"cannot load policy version {target.policy.number}: {error}"
            )

    async def _admit(self, server: StudentServer) -> None:
        """What must hold of a server before it gets a request, at the start and whenever it comes
        back.
        """
        if server.label and (found := await server.found_label()) != server.label:
            if LABEL.fullmatch(found):
                raise self._disowned(server, found)
            server.label = ""
        await self._check(server)
        await self._bring(server)

    async def _bring(self, server: StudentServer) -> None:
        """Put the newest version on `server`."""
        async with server.lock:
            while (target := self._target) is not None and server.label != target.label:
                if server.label and (found := await server.found_label()) != server.label:
                    raise self._disowned(server, found)
                await server.update(target, self._on_new_weights)

    def _is_ours(self, label: str) -> bool:
        match = LABEL.fullmatch(label)
        return match is not None and match["owner"] == self._owner

    def _disowned(self, server: StudentServer, found: str) -> EndpointFault:
        """Forget what was put on `server`, which holds other weights: it was started again, or is
        another generator's now.
        """
        server.label = ""
        if LABEL.fullmatch(found):
            self.displaced = UserError(
                f"another generator has put its weights on {server.name} (it calls them {found!r})",
                expected="servers of one generator alone, which replaces their weights",
                next_step=f"Stop one of the two, or give each servers of its own in {SECTION}.client.base_url.",
                exit=Exit.REFUSED,
            )
        fault = EndpointFault(
            f"it was started again, or loaded by somebody else: it holds weights that it calls {found!r}"
        )
        self.pool.mark_down(server, str(fault))
        return fault


def _number(label: str) -> int:
    return int(label.partition(".")[0])
