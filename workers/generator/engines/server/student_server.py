"""One vLLM server of the student: completions from it, and new weights into it, over its HTTP
routes.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx
import msgspec

from onstream.pipeline.http import BadReply, Endpoint, EndpointError, EndpointFault, decoded
from onstream.pipeline.weights import LoadedPolicy

GENERATE = "/inference/v1/generate"
WEIGHT_INFO = "/weight_info"
RPC = "/collective_rpc"
OnNewWeights = Literal["recompute", "keep", "wait", "abort"]
PAUSES: dict[OnNewWeights, str] = {
    "recompute": "mode=keep&clear_cache=true",
    "keep": "mode=keep&clear_cache=false",
    "wait": "mode=wait&clear_cache=true",
    "abort": "mode=abort&clear_cache=true",
}
"""How vLLM is paused for an update. The cache is cleared unless its stale entries are what was
asked for.
"""
FIRST_LOOK_S = 0.005
LAST_LOOK_S = 0.25


class _TokenLogprob(msgspec.Struct):
    logprob: float


class _Logprobs(msgspec.Struct):
    content: list[_TokenLogprob] | None = None


class LabelSpan(msgspec.Struct):
    """Tokens `start` to `end` of an answer, written with the weights that the server calls
    `version`.
    """

    version: str
    start: int
    end: int


class _GenerateChoice(msgspec.Struct):
    token_ids: list[int] | None = None
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None
    weight_versions: list[LabelSpan] | None = None


class _GenerateReply(msgspec.Struct):
    choices: list[_GenerateChoice]
    prompt_token_ids: list[int] | None = None


@dataclass(frozen=True)
class PartialCompletion:
    """What a server wrote: n tokens, their logprobs in nats, the labels of the weights over them,
    and why it ended.

    `prompt_ids` is what it read, where it was asked to tell.
    """

    token_ids: list[int]
    logprobs: list[float]
    labels: list[LabelSpan]
    finish_reason: str
    prompt_ids: list[int]


@dataclass(frozen=True)
class ServerUpdate:
    """A policy version as the servers get it: a file that they can read, and the label that they
    report it by.

    The label names version, weights and the generator that put them there, so that no other weights
    go by it.
    """

    policy: LoadedPolicy
    path: Path
    label: str


class StudentServer(Endpoint):
    """`label` is that of the weights that this generator put there last; empty while it is not
    known what the server holds.
    """

    def __init__(self, base_url: str, http: httpx.AsyncClient, timeout_s: float) -> None:
        super().__init__(base_url, http, timeout_s)
        self.label = ""
        self.context_tokens: int | None = None
        self.lock = asyncio.Lock()  # of its weights

    async def generate(self, body: dict[str, Any]) -> PartialCompletion:
        """What the server answers to `body`.

        Raises:
            EndpointFault: nothing that can be used.
            RequestRefused: it will not have this body.
        """
        try:
            reply = msgspec.json.decode(await self.post(GENERATE, body), type=_GenerateReply)
            [choice] = reply.choices
        except (msgspec.DecodeError, ValueError) as error:
            raise BadReply(f"not one choice with token ids and logprobs ({error})") from error
        token_ids = choice.token_ids or []
        labels = choice.weight_versions or []
        logprobs = [token.logprob for token in (choice.logprobs and choice.logprobs.content) or ()]
        if len(logprobs) != len(token_ids) or sum(span.end - span.start for span in labels) != len(
            token_ids
        ):
            raise BadReply(
                f"{len(token_ids)} tokens with {len(logprobs)} logprobs, and versions {labels}"
            )
        return PartialCompletion(
            token_ids, logprobs, labels, choice.finish_reason or "", reply.prompt_token_ids or []
        )

    async def found_label(self) -> str:
        """What the server calls the weights that it holds."""
        return str(decoded(await self.get(WEIGHT_INFO)).get("weight_version"))

    async def rpc(self, method: str, *args: str) -> list[Any]:
        """What each of the server's worker processes returns from `method`."""
        reply = decoded(await self.post(RPC, {"method": method, "args": args}))
        return list(reply.get("results") or ())

    async def resume(self) -> None:
        """Let a server go on that was paused; nothing to one that was not."""
        await self.post("/resume", {})

    async def update(self, target: ServerUpdate, on_new_weights: OnNewWeights) -> None:
        """Go on with the weights of `target`. What can be read wrong is read before anything is
        touched, while requests go on.

        Raises:
            EndpointError: it failed. With `label` as it was, the server goes on with what it had;
                empty, it may hold some of both, is left paused, and has handed back what it was
                writing.
        """
        await self._stage(target)
        await self.post(f"/pause?{PAUSES[on_new_weights]}", {})
        if on_new_weights == "keep":
            await self.post(
                "/reset_encoder_cache", {}
            )  # what the old vision tower made of images is for no new completion
        try:
            await self._begin()
        except EndpointError:
            await self.resume()
            raise
        self.label = ""
        try:
            await self.post(
                "/update_weights",
                {"update_info": {"path": str(target.path), "digest": target.policy.digest}},
            )
            await self.post("/finish_weight_update", {"weight_version": target.label})
        except EndpointError:
            with contextlib.suppress(
                EndpointError
            ):  # the failure that counts is the one that is raised
                await self.post("/pause?mode=abort", {})
            raise
        await self.resume()
        self.label = target.label

    async def _stage(self, target: ServerUpdate) -> None:
        """Have the file read and its digest checked, by every worker process."""
        await self.rpc("onstream_stage", str(target.path), target.policy.digest)
        look_s = FIRST_LOOK_S
        while "reading" in (states := set(await self.rpc("onstream_staged"))):
            await asyncio.sleep(look_s)
            look_s = min(2 * look_s, LAST_LOOK_S)
        if problems := states - {"ready"}:
            raise EndpointFault(
                f"{'; '.join(sorted(map(str, problems)))} (is {target.path.parent} a directory that the server can read?)"
            )

    async def _begin(self) -> None:
        """Open an update; one that somebody left open, who died over it, is closed first."""
        try:
            await self.post("/start_weight_update", {})
        except EndpointFault as fault:
            if fault.status is None:
                raise
            await self.post("/finish_weight_update", {})
            await self.post("/start_weight_update", {})
