"""One server that scores: how it is asked for scores, and its check at the start."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np

from onstream.pipeline.errors import UserError
from onstream.pipeline.http import (
    BadReply,
    Endpoint,
    EndpointError,
    EndpointFault,
    RequestRefused,
    require_model,
)
from onstream.pipeline.http.endpoint import key_refused
from onstream.pipeline.records import Logprobs
from onstream.pipeline.telemetry import get_logger
from onstream.settings.sections.client import TeacherModelSettings
from onstream.settings.teacher_protocols import TEACHER_PROTOCOLS
from onstream.workers.teacher.external.protocols import TeacherProtocol, load_variants
from onstream.workers.teacher.external.protocols.vllm import VllmGenerate
from onstream.workers.teacher.external.student_info import StudentInfo
from onstream.workers.teacher.external.vocabulary import compare_by_routes, compare_by_texts
from onstream.workers.teacher.scorer import ScoreRequest, Scores

IMAGE_PROTOCOL = VllmGenerate.name
"""The protocol that can send images, for messages."""
CHECK_S = 8.0
SAME_NATS = 0.05
"""Mean distance of two scores of one text by one endpoint. With bfloat16 in changing batches it
stays below this.
"""
ALIKE_NATS = 0.2
"""The same between endpoints, whose hardware and precision may differ."""
SECTION = "orchestrator.teacher_model"


class TeacherEndpoint(Endpoint):
    """A server that scores.

    The check at the start fills in `protocol`, `top_k`, and `context_tokens` where the server says
    them.
    """

    def __init__(self, base_url: str, http: httpx.AsyncClient, timeout_s: float) -> None:
        super().__init__(base_url, http, timeout_s)
        self.protocol: TeacherProtocol | None = None
        self.top_k = 0
        self.context_tokens: int | None = None

    async def score(self, request: ScoreRequest, model: str) -> Scores:
        """The scores of `request`, with the `top_k` likeliest tokens.

        Raises:
            EndpointFault: the server failed, and the request is not the cause.
            RequestRefused: the request is too long, the server refuses it, or it would be scored
                without its images.
        """
        assert self.protocol is not None, "an endpoint that serves has been checked"
        if request.images and (request.image_fields is None or not self.protocol.carries_images):
            raise RequestRefused(
                f"it would be scored without its images: {self.protocol.name} sends token ids "
                f"alone, and {IMAGE_PROTOCOL} images too"
            )
        if self.context_tokens is not None and request.tokens + 1 > self.context_tokens:
            raise RequestRefused(
                f"{request.tokens} tokens, and one that scoring takes, "
                f"exceed its context of {self.context_tokens}"
            )
        reply = await self.post(self.protocol.path, self.protocol.body(model, request, self.top_k))
        return self.protocol.scores(reply, request, self.top_k)


@dataclass(frozen=True)
class Tried:
    """A protocol that works at an endpoint, and what it gave for the check's text."""

    protocol: TeacherProtocol
    top_k: int
    scores: Scores
    texts: dict[int, str]


@dataclass
class EndpointCheck:
    """Checks that an endpoint can be this run's teacher.

    It is asked for as many of the likeliest tokens as it gives, up to `most_top_k`; one that gives
    fewer than `least_top_k` is refused. Its chat template is rendered with `template_arguments`.

    `reference` is how the first endpoint that passed scored the check's text. The others, and
    whatever comes back, must score it alike. `top_k` is what the one that gives most gives.
    """

    student: StudentInfo
    teacher: TeacherModelSettings
    most_top_k: int
    least_top_k: int
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    reference: Logprobs | None = None
    top_k: int = 0

    async def __call__(self, endpoint: TeacherEndpoint) -> None:
        """Check `endpoint`, and fill in its protocol, its context and what it gives.

        Raises:
            UserError: it answers, and cannot be this run's teacher.
            EndpointFault: it does not answer, or not in time.
        """
        try:
            async with asyncio.timeout(CHECK_S):
                logprobs = await self._check(endpoint)
        except TimeoutError as error:
            message = f"the questions of the start took longer than {CHECK_S:g} s"
            raise EndpointFault(message) from error
        if self.reference is None:
            self.reference = logprobs
        nats = distance(self.reference, logprobs)
        if nats > ALIKE_NATS:
            raise _other_weights(endpoint, nats, ALIKE_NATS, self._model)
        self.top_k = max(self.top_k, endpoint.top_k)
        if endpoint.top_k < self.most_top_k:
            get_logger().warning(
                "the endpoint gives fewer of the teacher's likeliest tokens",
                endpoint=endpoint.name,
                gives=endpoint.top_k,
                asked=self.most_top_k,
            )

    async def _check(self, endpoint: TeacherEndpoint) -> Logprobs:
        listed = {}
        if not self.teacher.client.skip_model_check:
            listed = await require_model(endpoint, self._model, SECTION)
        tried = await self._choose_protocol(endpoint)
        tokenized = await compare_by_routes(
            self.student.model, endpoint, self._model, self.template_arguments
        )
        if tokenized is None:
            texts = tried.texts or await self._texts(endpoint, tried.protocol)
            compare_by_texts(self.student.model, endpoint, texts)
        context = listed.get("max_model_len") or (tokenized.max_model_len if tokenized else None)
        await self._check_context(endpoint, tried.protocol, context)
        await self._check_repeatable(endpoint, tried)
        if self.student.image_request is not None:
            await self._check_images(endpoint, tried, self.student.image_request)
        endpoint.protocol = tried.protocol
        endpoint.top_k = tried.top_k
        endpoint.context_tokens = context
        return tried.scores.logprobs

    @property
    def _model(self) -> str:
        return self.teacher.model.name

    async def _choose_protocol(self, endpoint: TeacherEndpoint) -> Tried:
        """The protocol that gives most of the likeliest tokens, of several the first."""
        refusals: dict[str, EndpointError] = {}
        best: TeacherProtocol | None = None
        most = -1  # likeliest tokens that some protocol gives; -1 while none gives logprobs
        for protocol in load_variants(self.teacher.client.protocol):
            try:
                given = await self._most_likeliest(endpoint, protocol)
            except EndpointError as fault:
                if fault.status is None and not isinstance(fault, BadReply):
                    raise
                refusals.setdefault(protocol.name, fault)
                continue
            if given > most:
                best = protocol
                most = given
            if most >= self.most_top_k:
                break
        if best is None:
            raise _no_logprobs(endpoint, refusals)
        if most < self.least_top_k:
            raise _too_few_likeliest(endpoint, self.most_top_k, self.least_top_k, most)
        return await self._ask(endpoint, best, self.student.check_request, most)

    async def _most_likeliest(self, endpoint: TeacherEndpoint, protocol: TeacherProtocol) -> int:
        """The most likeliest tokens that `protocol` gives here, up to `most_top_k`, by halving.

        Raises:
            EndpointFault, RequestRefused: it gives no logprobs at all.
        """
        if self.most_top_k and await self._gives(endpoint, protocol, self.most_top_k):
            return self.most_top_k
        await self._ask(endpoint, protocol, self.student.check_request, 0)
        given = 0
        refused = max(1, self.most_top_k)
        while refused - given > 1:
            middle = (given + refused) // 2
            if await self._gives(endpoint, protocol, middle):
                given = middle
            else:
                refused = middle
        return given

    async def _gives(
        self, endpoint: TeacherEndpoint, protocol: TeacherProtocol, top_k: int
    ) -> bool:
        try:
            await self._ask(endpoint, protocol, self.student.check_request, top_k)
        except (BadReply, RequestRefused):
            return False
        except EndpointFault as fault:
            if fault.status is None:
                raise
            return False
        return True

    async def _ask(
        self,
        endpoint: TeacherEndpoint,
        protocol: TeacherProtocol,
        request: ScoreRequest,
        top_k: int,
    ) -> Tried:
        reply = await endpoint.post(protocol.path, protocol.body(self._model, request, top_k))
        scores = protocol.scores(reply, request, top_k)
        return Tried(protocol, top_k, scores, protocol.texts(reply, request))

    async def _texts(self, endpoint: TeacherEndpoint, protocol: TeacherProtocol) -> dict[int, str]:
        """The texts of the check's tokens, by the variant of `protocol` that gives them, if any."""
        variant = protocol.with_texts
        if variant is None:
            return {}
        return (await self._ask(endpoint, variant, self.student.check_request, 0)).texts

    async def _check_context(
        self, endpoint: TeacherEndpoint, protocol: TeacherProtocol, context: int | None
    ) -> None:
        """Check that the longest sample fits the endpoint's context.

        A server that does not tell its context is sent a sample of that length.
        """
        longest = self.student.longest_sample
        if context is not None and context < longest + 1:
            raise _context_too_short(endpoint, f"{context} tokens", longest)
        if context is None:
            ids = np.resize(self.student.check_request.completion_ids, longest)
            try:
                await self._ask(endpoint, protocol, ScoreRequest(ids[:-1], ids[-1:]), 0)
            except RequestRefused as refusal:
                found = f"too short for {longest} tokens ({refusal})"
                raise _context_too_short(endpoint, found, longest) from refusal

    async def _check_repeatable(self, endpoint: TeacherEndpoint, first: Tried) -> None:
        request = self.student.check_request
        again = await self._ask(endpoint, first.protocol, request, first.top_k)
        nats = distance(first.scores.logprobs, again.scores.logprobs)
        if nats > SAME_NATS:
            raise _not_repeatable(endpoint, nats, SAME_NATS)

    async def _check_images(
        self, endpoint: TeacherEndpoint, tried: Tried, request: ScoreRequest
    ) -> None:
        """Check that it scores a prompt with an image, of which it makes the student's tokens."""
        protocol = tried.protocol
        try:
            if not protocol.carries_images:
                raise RequestRefused(
                    f"the protocol is {protocol.name}, which sends token ids alone"
                )
            await self._ask(endpoint, protocol, request, tried.top_k)
        except RequestRefused as refusal:
            raise _no_images(endpoint, refusal) from refusal


def distance(some: Logprobs, others: Logprobs) -> float:
    """The mean distance [nats] of two scores of one text."""
    return float(np.abs(some.astype(np.float64) - others).mean())


def _other_weights(endpoint: Endpoint, nats: float, bound: float, model: str) -> UserError:
    """It scores the check's text otherwise than the first endpoint did."""
    return UserError(
        f"{endpoint.name} scores one text {nats:.3g} nats a token away from what this teacher "
        "scored it first",
        expected=f"at most {bound:g}, from one teacher with the same weights everywhere",
        next_step=f"Serve {model!r} with the same weights at every address of "
        f"{SECTION}.client.base_url.",
    )


def _not_repeatable(endpoint: Endpoint, nats: float, bound: float) -> UserError:
    """It scores one text differently each time."""
    return UserError(
        f"the teacher at {endpoint.name} scored one text twice, {nats:.3g} nats a token apart",
        expected=f"at most {bound:g}: its scores would be mostly noise",
        next_step=f"Check that {SECTION}.client.base_url is one server, or several with the same "
        "weights.",
    )


def _too_few_likeliest(endpoint: Endpoint, asked: int, least: int, most: int) -> UserError:
    """It gives `most` of the likeliest tokens; `asked` were asked for, and `least` are needed."""
    gives = "no likeliest tokens beside the one asked for"
    if most:
        gives = f"the {most} likeliest tokens of a position at most"
    if least < asked:
        return UserError(
            f"the teacher at {endpoint.name} gives {gives}",
            expected="at least 1: at another temperature than 1, and with another "
            'trainer.loss.teacher_divergence than "reverse", the sampled token does not do',
            next_step="Raise the server's own limit (vLLM: --max-logprobs), or set "
            'inference.sampling.temperature = 1.0 and teacher_divergence = "reverse".',
        )
    return UserError(
        f"trainer.loss.teacher_top_k = {asked}, but the teacher at {endpoint.name} gives {gives}",
        expected=f"teacher_top_k ≤ {most}, or a server that gives more",
        next_step=f"Set trainer.loss.teacher_top_k = {most}, or raise the server's own limit "
        "(vLLM: --max-logprobs).",
    )


def _no_logprobs(endpoint: Endpoint, refusals: Mapping[str, EndpointError]) -> Exception:
    """No protocol gave the logprobs of a prompt. `refusals` has what came instead, by protocol."""
    answers = "; ".join(f"{name}: {fault}" for name, fault in refusals.items())
    statuses = {fault.status or 0 for fault in refusals.values()}
    if statuses <= {401}:
        return key_refused(endpoint, next(iter(refusals.values())), SECTION)
    if all(status >= 500 or status == 429 for status in statuses):
        return EndpointFault(answers, status=max(statuses))
    return UserError(
        f"the teacher at {endpoint.name} returns no logprobs of a prompt ({answers})",
        expected=f"a server that speaks {', '.join(TEACHER_PROTOCOLS)}",
        next_step=f"Correct {SECTION}.client.base_url, or serve the teacher with vLLM. Chat "
        "endpoints can be teachers by orchestrator.teacher_rollout_model alone.",
    )


def _context_too_short(endpoint: Endpoint, context: str, longest: int) -> UserError:
    """A sample of `longest` tokens does not fit its context."""
    return UserError(
        f"the context of the teacher at {endpoint.name} is {context}",
        expected=f"at least {longest + 1}: a sample of up to {longest} tokens, prompt and "
        "completion, and one more that scoring takes",
        next_step="Lower inference.sampling.max_completion, or serve the teacher with a longer "
        "context (vLLM: --max-model-len).",
    )


def _no_images(endpoint: Endpoint, refusal: Exception) -> UserError:
    """It cannot be sent the images of the task's prompts."""
    return UserError(
        f"the task's prompts hold images, and the teacher at {endpoint.name} would score them "
        f"without: {refusal}",
        expected=f"a vLLM server of the student's family, asked by the protocol {IMAGE_PROTOCOL}",
        next_step="Serve such a teacher with --enable-scale-out, or score with a local one "
        "(docs/images.md).",
    )
