"""The vLLM servers of the student, all at one policy version; others get no requests."""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Awaitable, Callable, Collection
from dataclasses import replace
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
from onstream.workers.generator.engines.vllm.request import (
    ABORTED,
    VllmRequest,
    fields_of,
    require_same_tokens,
)

SECTION = "inference"
ENDS = (ABORTED, *get_args(FinishReason))
LABEL = re.compile(r"(?P<number>\d+)\.(?P<digest>[0-9a-f]{12})\.(?P<owner>[0-9a-f]{8})")


class ServerGroup:
    """The servers of one generator. All calls come from one event loop.

    A server belongs to the generator whose name is in the label of its weights. A generator that
    starts takes its servers over, since the one before it may be dead. One that finds another's
    label on its server stops (`displaced`). One that finds an older label of its own, of an update
    that it had given up and that was applied late, puts the newest weights there again.

    `version` is the version of the next request; −1 before the first.

    Args:
        client: how the servers are reached.
        model: the student's name at the servers.
        on_new_weights: what becomes of running completions.
        stop_ids: a completion ends with any of these.
        check: what must hold of a server before it is used.
        vllm_prompts: builds prompts with images.
    """

    def __init__(
        self,
        client: StudentClientSettings,
        model: str,
        on_new_weights: OnNewWeights,
        stop_ids: Collection[int],
        check: Callable[[StudentServer], Awaitable[None]],
        vllm_prompts: VllmPrompts,
    ) -> None:
        self._vllm_prompts = vllm_prompts
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
        self._updating: asyncio.Task[None] | None = None

    async def write(self, request: VllmRequest) -> None:
        """Write `request` to its end, however long no server is there.

        Raises:
            RequestRefused: a server refuses it.
            UserError: a server makes other tokens of its images than the student's processor.
        """
        replica = request.request.replica
        chosen = None if replica is None else self.pool.endpoints[replica]
        while request.finish_reason is None:
            try:
                answered = await self.pool.ask(lambda server: self._ask(server, request), chosen)
            except RequestRefused as refusal:
                # Without a status it only failed often while others were answered: ask again.
                if refusal.status is None:
                    continue
                raise
            part = answered.answer
            versions = [(_number(span.version), span.start, span.end) for span in part.labels]
            request.take(part.token_ids, part.logprobs, versions, part.finish_reason)

    async def load(self, policy: LoadedPolicy, path: Path) -> None:
        """Put `policy`, which is in the file `path`, on every server that is there.

        Those that fail get no requests until they have it. Returns when all is done, for the newest
        version if one came meanwhile.
        """
        label = f"{policy.number}.{policy.digest[:12]}.{self._owner}"
        self._target = ServerUpdate(policy, path, label)
        if self._updating is None or self._updating.done():
            self._updating = asyncio.create_task(self._update_all())
        await asyncio.shield(self._updating)

    async def _ask(self, server: StudentServer, request: VllmRequest) -> PartialCompletion:
        """What `server` writes next.

        The salt separates its prefix cache by version: a request finds no keys and values of
        another one there.
        """
        if self._on_new_weights == "keep" and not server.label:
            async with server.lock:
                pass  # its weights are being replaced, and there is no salt for the new ones yet
        asked_of = server.label
        body = {
            "model": self._model,
            "token_ids": request.prompt_ids,
            "sampling_params": request.sampling_params(self._stop_ids),
            "cache_salt": asked_of,
        }
        if request.request.images:
            body |= fields_of(request, self._vllm_prompts)
        part = await server.generate(body)
        if request.request.images:
            require_same_tokens(part.prompt_ids, request)
        for span in part.labels:
            if not self._is_ours(span.version) or _is_older(span.version, asked_of):
                raise self._lost_weights(server, span.version)
        if part.finish_reason not in ENDS:
            raise BadReply(f"an answer that ended by {part.finish_reason!r}")
        if self._on_new_weights == "keep" and _began_after_an_update(part, asked_of):
            # With `keep` the prefix cache outlives the update, and what the older salt found there
            # may be the older version's. Nothing in the spans would say so: ask again.
            return replace(part, token_ids=[], logprobs=[], labels=[], finish_reason=ABORTED)
        return part

    async def _update_all(self) -> None:
        loaded: ServerUpdate | None = None
        while (target := self._target) is not None and loaded != target:
            present = [server for server in self.pool.endpoints if not server.down]
            await asyncio.gather(*(self._update_one(server, target) for server in present))
            self.version = target.policy.number
            loaded = target

    async def _update_one(self, server: StudentServer, target: ServerUpdate) -> None:
        try:
            await self._update_to_newest(server)
        except EndpointError as error:
            self.pool.mark_down(
                server, f"cannot load policy version {target.policy.number}: {error}"
            )

    async def _admit(self, server: StudentServer) -> None:
        """Check a server and update it, at the start and whenever it comes back."""
        if server.label and (found := await server.found_label()) != server.label:
            if self._is_anothers(found):
                raise self._lost_weights(server, found)
            server.label = ""
        await self._check(server)
        await self._update_to_newest(server)

    async def _update_to_newest(self, server: StudentServer) -> None:
        """Put the newest version on `server`, even if a newer one comes meanwhile."""
        async with server.lock:
            while (target := self._target) is not None and server.label != target.label:
                if server.label and (found := await server.found_label()) != server.label:
                    raise self._lost_weights(server, found)
                await server.update(target, self._on_new_weights)

    def _is_ours(self, label: str) -> bool:
        match = LABEL.fullmatch(label)
        return match is not None and match["owner"] == self._owner

    def _is_anothers(self, label: str) -> bool:
        return LABEL.fullmatch(label) is not None and not self._is_ours(label)

    def _lost_weights(self, server: StudentServer, found: str) -> EndpointFault:
        """The fault of a server that has the weights `found` instead of this generator's newest.

        It was started again, another generator has taken it over, or an update of this generator's
        own, whose reply was lost, was applied after a newer one.
        """
        server.label = ""
        if self._is_anothers(found):
            self.displaced = UserError(
                f"another generator has put its weights on {server.name} (it calls them {found!r})",
                expected="servers of one generator alone, which replaces their weights",
                next_step="Stop one of the two, or give each servers of its own in "
                f"{SECTION}.client.base_url.",
                exit=Exit.REFUSED,
            )
        if self._is_ours(found):
            cause = "an update that was given up has reached it late"
        else:
            cause = "it was started again, or loaded by somebody else"
        fault = EndpointFault(f"{cause}: it holds weights that it calls {found!r}")
        self.pool.mark_down(server, str(fault))
        return fault


def _number(label: str) -> int:
    return int(label.partition(".")[0])


def _began_after_an_update(part: PartialCompletion, asked_of: str) -> bool:
    """Whether an update came between the asking and the first token."""
    return bool(part.labels) and part.labels[0].version != asked_of


def _is_older(label: str, asked_of: str) -> bool:
    """Whether `label` is of an older version than the server was known to have when it was asked.

    That a newer one came meanwhile is no fault: a request goes on across an update.
    """
    return bool(asked_of) and _number(label) < _number(asked_of)
