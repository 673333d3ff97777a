"""What an endpoint must show before anything is sent to it: at the start, and whenever it comes
back.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace

import numpy as np

from onstream.pipeline.errors import UserError
from onstream.pipeline.http import (
    BadReply,
    EndpointError,
    EndpointFault,
    RequestRefused,
    require_model,
)
from onstream.pipeline.http.served_models import key_refused
from onstream.pipeline.records import Logprobs
from onstream.settings.sections.client import TeacherModelSettings
from onstream.workers.teacher.external.endpoint import TeacherEndpoint
from onstream.workers.teacher.external.protocols import (
    SHOWN_IMAGES,
    VARIANTS,
    Echo,
    TeacherProtocol,
)
from onstream.workers.teacher.external.student_info import StudentInfo
from onstream.workers.teacher.external.vocabulary import compare_by_routes, compare_by_texts
from onstream.workers.teacher.scorer import ScoreRequest, Scores

SECTION = "orchestrator.teacher_model"
CHECK_S = 8.0
SAME_NATS = 0.05
"""Mean distance of two scores of one prompt by one endpoint; bfloat16 in changing batches stays
below it.
"""
ALIKE_NATS = 0.2
"""The same between endpoints, whose hardware and precision may differ."""


@dataclass
class EndpointCheck:
    """Asks an endpoint all that must hold. `top_k` likeliest tokens will be asked for.

    `reference` is what the first endpoint that passed scored the probe's text; the others, and
    whatever comes back, must score it alike.
    """

    student: StudentInfo
    teacher: TeacherModelSettings
    top_k: int
    reference: Logprobs | None = None

    async def __call__(self, endpoint: TeacherEndpoint) -> None:
        """Checks `endpoint` and fills in its protocol and context.

        Raises:
            UserError: it answers, and cannot be this run's teacher.
            EndpointFault: it does not answer, or not in time.
        """
        try:
            async with asyncio.timeout(CHECK_S):
                logprobs = await self._check(endpoint)
        except TimeoutError as error:
            raise EndpointFault(
                f"the questions of the start took longer than {CHECK_S:g} s"
            ) from error
        if self.reference is None:
            self.reference = logprobs
        if (nats := distance(self.reference, logprobs)) > ALIKE_NATS:
            raise UserError(
                f"{endpoint.name} scores one text {nats:.3g} nats a token away from what this teacher scored it first",
                expected=f"at most {ALIKE_NATS:g}, from one teacher with the same weights everywhere",
                next_step=f"Serve {self._model!r} with the same weights at every address of {SECTION}.client.base_url.",
            )

    async def _check(self, endpoint: TeacherEndpoint) -> Logprobs:
        listed = (
            {}
            if self.teacher.client.skip_model_check
            else await require_model(endpoint, self._model, SECTION)
        )
        protocol, scores, texts = await self._negotiate(endpoint)
        tokenized = await compare_by_routes(self.student.model, endpoint, self._model)
        if tokenized is None:
            compare_by_texts(
                self.student.model, endpoint, texts or await self._texts(endpoint, protocol)
            )
        context = listed.get("max_model_len") or (tokenized.max_model_len if tokenized else None)
        await self._check_context(endpoint, protocol, context)
        await self._check_repeatable(endpoint, protocol, scores)
        if self.student.image_request is not None:
            await self._check_images(endpoint, protocol, self.student.image_request)
        endpoint.protocol = protocol
        endpoint.context_tokens = context
        return scores.logprobs

    @property
    def _model(self) -> str:
        return self.teacher.model.name

    async def _negotiate(
        self, endpoint: TeacherEndpoint
    ) -> tuple[TeacherProtocol, Scores, dict[int, str]]:
        """The first protocol that gives the logprobs of a prompt, and as many likeliest tokens as
        are asked for.
        """
        pinned = self.teacher.client.protocol
        refusals = dict[str, EndpointError]()
        most = -1
        for protocol in (variant for variant in VARIANTS if pinned in ("auto", variant.name)):
            try:
                most = max(most, await self._most(endpoint, protocol))
            except EndpointError as fault:
                if fault.status is None and not isinstance(fault, BadReply):
                    raise
                refusals.setdefault(protocol.name, fault)
                continue
            if most >= self.top_k:
                return protocol, *await self._asked(
                    endpoint, protocol, self.student.check_request, self.top_k
                )
        if most >= 0:
            raise self._too_few(endpoint, most)
        raise self._speechless(endpoint, refusals)

    async def _most(self, endpoint: TeacherEndpoint, protocol: TeacherProtocol) -> int:
        """The most likeliest tokens that `protocol` gives here, up to `top_k`, by halving.

        Raises:
            EndpointFault, RequestRefused: it gives no logprobs at all.
        """
        if self.top_k and await self._gives(endpoint, protocol, self.top_k):
            return self.top_k
        await self._asked(endpoint, protocol, self.student.check_request, 0)
        most = 0
        refused = max(1, self.top_k)
        while refused - most > 1:
            middle = (most + refused) // 2
            most, refused = (
                (middle, refused)
                if await self._gives(endpoint, protocol, middle)
                else (most, middle)
            )
        return most

    async def _gives(
        self, endpoint: TeacherEndpoint, protocol: TeacherProtocol, top_k: int
    ) -> bool:
        try:
            await self._asked(endpoint, protocol, self.student.check_request, top_k)
        except (BadReply, RequestRefused):
            return False
        except EndpointFault as fault:
            if fault.status is None:
                raise
            return False
        return True

    async def _asked(
        self,
        endpoint: TeacherEndpoint,
        protocol: TeacherProtocol,
        request: ScoreRequest,
        top_k: int,
    ) -> tuple[Scores, dict[int, str]]:
        reply = await endpoint.post(protocol.path, protocol.body(self._model, request, top_k))
        return protocol.scores(reply, request, top_k), protocol.texts(reply, request)

    async def _texts(self, endpoint: TeacherEndpoint, protocol: TeacherProtocol) -> dict[int, str]:
        """The texts of the probe's tokens, asked for in the one protocol that has them or ids and
        not both.
        """
        if not isinstance(protocol, Echo):
            return {}
        return (
            await self._asked(
                endpoint, replace(protocol, named_ids=False), self.student.check_request, 0
            )
        )[1]

    async def _check_context(
        self, endpoint: TeacherEndpoint, protocol: TeacherProtocol, context: int | None
    ) -> None:
        """By what the server says of its context; where it says nothing, by sending a sample as
        long as they come.
        """
        longest = self.student.longest_sample
        if context is not None and context < longest + 1:
            raise self._too_short(endpoint, f"{context} tokens")
        if context is None:
            ids = np.resize(self.student.check_request.completion_ids, longest)
            try:
                await self._asked(endpoint, protocol, ScoreRequest(ids[:-1], ids[-1:]), 0)
            except RequestRefused as refusal:
                raise self._too_short(
                    endpoint, f"too short for {longest} tokens ({refusal})"
                ) from refusal

    async def _check_repeatable(
        self, endpoint: TeacherEndpoint, protocol: TeacherProtocol, first: Scores
    ) -> None:
        again, _ = await self._asked(endpoint, protocol, self.student.check_request, self.top_k)
        nats = distance(first.logprobs, again.logprobs)
        if nats > SAME_NATS:
            raise UserError(
                f"the teacher at {endpoint.name} scored one text twice, {nats:.3g} nats a token apart",
                expected=f"at most {SAME_NATS:g}: its judgement would be mostly noise",
                next_step=f"Check that {SECTION}.client.base_url is one server, or several with the same weights.",
            )

    async def _check_images(
        self, endpoint: TeacherEndpoint, protocol: TeacherProtocol, shown: ScoreRequest
    ) -> None:
        """Whether it scores a prompt with a picture, of which it makes the student's tokens."""
        try:
            if protocol.name != SHOWN_IMAGES:
                raise RequestRefused(
                    f"the protocol is {protocol.name}, which sends token ids alone"
                )
            await self._asked(endpoint, protocol, shown, self.top_k)
        except RequestRefused as refusal:
            raise UserError(
                f"the task's prompts hold images, and the teacher at {endpoint.name} would judge them blind: {refusal}",
                expected=f"a vLLM server of the student's family, asked by the protocol {SHOWN_IMAGES}",
                next_step="Serve such a teacher with --enable-scale-out, or score with a local one (docs/images.md).",
            ) from refusal

    def _too_few(self, endpoint: TeacherEndpoint, most: int) -> UserError:
        gives = (
            f"the {most} likeliest tokens of a position at most"
            if most
            else "no likeliest tokens beside the one asked for"
        )
        return UserError(
            f"trainer.loss.teacher_top_k = {self.top_k}, but the teacher at {endpoint.name} gives {gives}",
            expected=f"teacher_top_k ≤ {most}, or a server that gives more",
            next_step=f"Set trainer.loss.teacher_top_k = {most}, or raise the server's own limit (vLLM: --max-logprobs).",
        )

    def _speechless(
        self, endpoint: TeacherEndpoint, refusals: dict[str, EndpointError]
    ) -> Exception:
        answers = "; ".join(f"{name}: {fault}" for name, fault in refusals.items())
        statuses = {fault.status or 0 for fault in refusals.values()}
        if statuses <= {401}:
            return key_refused(endpoint, next(iter(refusals.values())), SECTION)
        if all(status >= 500 or status == 429 for status in statuses):
            return EndpointFault(answers, status=max(statuses))
        return UserError(
            f"the teacher at {endpoint.name} returns no logprobs of a prompt ({answers})",
            expected=f"a server that speaks {', '.join(dict.fromkeys(variant.name for variant in VARIANTS))}",
            next_step=f"Correct {SECTION}.client.base_url, or serve the teacher with vLLM; chat endpoints can be teachers by "
            "orchestrator.teacher_rollout_model alone.",
        )

    def _too_short(self, endpoint: TeacherEndpoint, context: str) -> UserError:
        longest = self.student.longest_sample
        return UserError(
            f"the context of the teacher at {endpoint.name} is {context}",
            expected=f"at least {longest + 1}: a sample of up to {longest} tokens, prompt and completion, and one more that scoring takes",
            next_step="Lower inference.sampling.max_completion, or serve the teacher with a longer context (vLLM: --max-model-len).",
        )


def distance(some: Logprobs, others: Logprobs) -> float:
    """The mean distance [nats] of two scores of one text."""
    return float(np.abs(some.astype(np.float64) - others).mean())
