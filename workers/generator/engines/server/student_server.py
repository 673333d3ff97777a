"""One vLLM server of the student: completions from it, and new weights into it, over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx
import msgspec

from onstream.pipeline.http import BadReply, Endpoint, EndpointError, EndpointFault, decoded
from onstream.pipeline.record_codec import is_logprob
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
"""How vLLM is paused for an update. Only `keep` goes on with what its cache has."""
FIRST_POLL_S = 0.005
LONGEST_POLL_S = 0.25


class _TokenLogprob(msgspec.Struct):
    logprob: float


class _Logprobs(msgspec.Struct):
    content: list[_TokenLogprob] | None = None


class LabelSpan(msgspec.Struct):
    """Tokens `start` to `end` of an answer, written with the weights of label `version`."""

    version: str
    start: int
    end: int


class _CompletionChoice(msgspec.Struct):
    token_ids: list[int] | None = None
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None
    weight_versions: list[LabelSpan] | None = None


class _CompletionReply(msgspec.Struct):
    choices: list[_CompletionChoice]
    prompt_token_ids: list[int] | None = None


@dataclass(frozen=True)
class PartialCompletion:
    """What a server wrote before it finished a request, or aborted it.

    Args:
        token_ids: [n].
        logprobs: [n], in nats.
        labels: of the weights, over the tokens.
        finish_reason: why it ended.
        prompt_ids: the prompt as the server read it, where it was asked to return it.
    """

    token_ids: list[int]
    logprobs: list[float]
    labels: list[LabelSpan]
    finish_reason: str
    prompt_ids: list[int]


@dataclass(frozen=True)
class ServerUpdate:
    """A policy version for the servers: a file that they can read, and a label.

    Servers report their weights by the label. It names version, digest and generator, so that no
    other weights have it.
    """

    policy: LoadedPolicy
    path: Path
    label: str


class StudentServer(Endpoint):
    """A server. `label` is that of the weights that this generator put there last.

    It is empty while the server's weights are not known.
    """

    def __init__(self, base_url: str, http: httpx.AsyncClient, timeout_s: float) -> None:
        super().__init__(base_url, http, timeout_s)
        self.label = ""
        self.context_tokens: int | None = None
        self.lock = asyncio.Lock()  # held while its weights are replaced

    async def generate(self, body: dict[str, Any]) -> PartialCompletion:
        """What the server answers to `body`.

        Raises:
            EndpointFault: the answer cannot be used.
            RequestRefused: the server refuses this body.
        """
        try:
            reply = msgspec.json.decode(await self.post(GENERATE, body), type=_CompletionReply)
            [choice] = reply.choices
        except (msgspec.DecodeError, ValueError) as error:
            raise BadReply(f"not one choice with token ids and logprobs ({error})") from error
        token_ids = choice.token_ids or []
        labels = choice.weight_versions or []
        content = choice.logprobs.content if choice.logprobs else None
        logprobs = [token.logprob for token in content or ()]
        labelled_tokens = sum(span.end - span.start for span in labels)
        if not len(token_ids) == len(logprobs) == labelled_tokens:
            raise BadReply(
                f"{len(token_ids)} tokens with {len(logprobs)} logprobs, and versions {labels}"
            )
        if wrong := [logprob for logprob in logprobs if not is_logprob(logprob)]:
            raise BadReply(f"a token with the logprob {wrong[0]:g}; expected at most 0, in nats")
        return PartialCompletion(
            token_ids=token_ids,
            logprobs=logprobs,
            labels=labels,
            finish_reason=choice.finish_reason or "",
            prompt_ids=reply.prompt_token_ids or [],
        )

    async def found_label(self) -> str:
        """The label of the weights that the server has."""
        return str(decoded(await self.get(WEIGHT_INFO)).get("weight_version"))

    async def rpc(self, method: str, *args: str) -> list[Any]:
        """What each of the server's worker processes returns from `method`."""
        reply = decoded(await self.post(RPC, {"method": method, "args": args}))
        return list(reply.get("results") or ())

    async def resume(self) -> None:
        """Let a paused server go on. Does nothing to one that is not paused."""
        await self.post("/resume", {})

    async def update(self, target: ServerUpdate, on_new_weights: OnNewWeights) -> None:
        """Replace the weights by those of `target`.

        The file is read and checked first, while requests go on.

        Raises:
            EndpointError: it failed. If `label` is unchanged, the server goes on with the weights
                that it has. If it is empty, the server may have some of both, is left paused, and
                has handed back what it was writing.
        """
        await self._stage(target)
        await self.post(f"/pause?{PAUSES[on_new_weights]}", {})
        if on_new_weights == "keep":
            # What the old vision tower made of images is not for new completions, even with `keep`.
            await self.post("/reset_encoder_cache", {})
        try:
            await self._start_update()
        except EndpointError:
            await self.resume()
            raise
        # From here on the server may have some of both weights.
        self.label = ""
        try:
            await self._load(target)
        except EndpointError:
            with contextlib.suppress(EndpointError):  # the first failure is the one to report
                await self.post("/pause?mode=abort", {})
            raise
        await self.resume()
        self.label = target.label

    async def _load(self, target: ServerUpdate) -> None:
        info = {"path": str(target.path), "digest": target.policy.digest}
        await self.post("/update_weights", {"update_info": info})
        await self.post("/finish_weight_update", {"weight_version": target.label})

    async def _stage(self, target: ServerUpdate) -> None:
        """Let every worker process read the file and check its digest."""
        await self.rpc("onstream_stage", str(target.path), target.policy.digest)
        poll_s = FIRST_POLL_S
        states = set(await self.rpc("onstream_staged"))
        while "reading" in states:
            await asyncio.sleep(poll_s)
            poll_s = min(2 * poll_s, LONGEST_POLL_S)
            states = set(await self.rpc("onstream_staged"))
        if problems := states - {"ready"}:
            reasons = "; ".join(sorted(map(str, problems)))
            raise EndpointFault(
                f"{reasons} (is {target.path.parent} a directory that the server can read?)"
            )

    async def _start_update(self) -> None:
        """Start an update. One that a generator left open when it died is finished first."""
        try:
            await self.post("/start_weight_update", {})
        except EndpointFault as fault:
            if fault.status is None:
                raise
            await self.post("/finish_weight_update", {})
            await self.post("/start_weight_update", {})
