"""The worker that asks a chat endpoint for completions, on which the student is trained.

This is hard distillation: a teacher writes the completions, and they become tokens of the student.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from onstream.pipeline.http import (
    Endpoint,
    EndpointPool,
    EndpointReply,
    EventLoopThread,
    RequestRefused,
    TokenBudget,
    chat_request,
    choices_of,
    require_model,
    total_tokens,
)
from onstream.pipeline.images import ImageError, PromptImage
from onstream.pipeline.prompts import PROMPTS_KEPT, Prompt
from onstream.pipeline.record_codec import ids_bytes, logprobs_bytes, mask_bytes
from onstream.pipeline.records import FinishReason, Sample, StageName
from onstream.pipeline.stage import Delivery, Outcome, Stats
from onstream.pipeline.tasks import Problem, load_task
from onstream.pipeline.telemetry import get_logger
from onstream.settings.chat_templates import arguments_of
from onstream.settings.root import Settings
from onstream.workers.generator.chat_template import ReconstructionError
from onstream.workers.generator.reconstruction import ReconstructedSample, Reconstructor
from onstream.workers.generator.student import load_student_model
from onstream.workers.generator.tickets import (
    STAGE,
    ImagesToHold,
    rollout_of,
    split_unusable,
)

if TYPE_CHECKING:
    from onstream.pipeline.redis.bus import Bus

SETTING = "orchestrator.teacher_rollout_model"
POLL_S = 0.05
ChatReply = Future[EndpointReply[Any]]

log = get_logger()


@dataclass(frozen=True)
class ChatRequest:
    """One request for the tickets of one group, with a choice for each.

    `retry_of_refused` is set where a request for several choices was refused, perhaps because the
    endpoint does not know `n`, and this asks for one of them.
    """

    deliveries: list[Delivery]
    retry_of_refused: bool = False


class ChatGenerator:
    """Makes rollouts of what chat endpoints answer. No policy wrote them.

    - Consumes: tickets.
    - Waits for: answers of the endpoints, which a thread of its own collects.
    - Is unblocked by: answers, and endpoints that come back.
    - Produces: rollouts.

    Each `handle` starts requests for new tickets, waits a moment for an answer, and turns answers
    into tokens of the student. While no endpoint is available, or past the budget of tokens, it
    takes no tickets, and `stats.detail` says why; the tickets that it has wait.
    """

    name: StageName = STAGE
    holds_entries = False

    def __init__(self, settings: Settings, bus: Bus) -> None:
        source = settings.orchestrator.teacher_rollout_model
        assert source is not None, "the chat generator is for runs with a teacher_rollout_model"
        self.stats = Stats(
            numbers=dict.fromkeys(("running", "waiting", "tokens", "requests", "failures"), 0.0)
        )
        self._settings = settings
        self._source = source
        self._bus = bus
        self._pool = EndpointPool(
            source.client,
            Endpoint,
            model=source.model.name,
            section=SETTING,
            check=self._check_endpoint,
            conclusive=False,
        )
        self._budget = TokenBudget(
            bus.scores,
            self.name,
            source.client.max_tokens_per_run,
            f"{SETTING}.client.max_tokens_per_run",
        )
        self._background = EventLoopThread()
        self._queue: deque[ChatRequest] = deque()
        self._running: dict[ChatReply, ChatRequest] = {}
        self._images = ImagesToHold(bus.images, settings.delivery.max_handle / 2)
        # Whether a request may ask for several choices. Greedy ones would all be equal.
        self._several = source.temperature > 0
        self._warned: set[str] = set()

    def setup(self) -> None:
        """Load the task and the student's tokenizer, and check the endpoints.

        Raises:
            UserError: there is no such task or student, the student does not stop where its chat
                template ends an answer, or the endpoints cannot be used.
        """
        self._task = load_task(self._settings)
        self._student = load_student_model(self._settings.model.name, self._settings)
        self._student.require_template_end()
        self._reconstructor = Reconstructor(
            self._student.tokenizer, self._student.stop_ids, self._student.template_arguments
        )
        self._prepared = lru_cache(maxsize=PROMPTS_KEPT)(self._prepare)
        # A run that had completions before waits for its endpoints. One that begins ends at once
        # if an address is wrong.
        self._background.run(self._pool.open(patient=self.name in self._bus.state.ready_stages()))
        self._budget.open()
        self._report()

    @property
    def room(self) -> int:
        """How many more tickets it takes.

        As many groups as the endpoints take requests, or tickets where each is a request.
        """
        if not self._budget.allows():
            return 0
        most = self._pool.capacity
        if self._several:
            most *= self._settings.orchestrator.group_size
        return max(0, most - self._tickets_in_hand)

    @property
    def busy(self) -> bool:
        """Whether answers may come soon. Past the budget, requests that were not sent wait."""
        return bool(self._running) or (bool(self._queue) and self._may_send)

    def handle(self, new: Sequence[Delivery]) -> list[Outcome]:
        """Ask for the new tickets' completions, and return those that have come."""
        usable, refused = split_unusable(new, self._prepared, (ImageError,))
        self._queue.extend(self._requests([delivery for delivery, _ in usable]))
        while self._queue and self._may_send:
            request = self._queue.popleft()
            reply = self._background.submit(self._pool.ask(chat_request(self._body(request))))
            self._running[reply] = request
        outcomes = []
        for reply, request in self._finished():
            outcomes += self._outcomes(reply, request)
        self._budget.report()
        # Before the loop moves the rollouts on: others look for the images that those name.
        self._images.hold()
        self._report()
        return refused + outcomes

    def close(self, *, finished: bool) -> None:
        """Forget what is in hand; the loop gives it back."""
        self._background.stop(self._pool.close)
        self._running.clear()
        self._queue.clear()

    async def _check_endpoint(self, endpoint: Endpoint) -> None:
        """Check an endpoint, at the start and when it comes back."""
        if not self._source.client.skip_model_check:
            await require_model(endpoint, self._source.model.name, SETTING)

    @property
    def _may_send(self) -> bool:
        return len(self._running) < self._pool.capacity and self._budget.allows()

    @property
    def _tickets_in_hand(self) -> int:
        return _tickets_of(self._queue) + _tickets_of(self._running.values())

    def _prepare(self, index: int) -> tuple[Problem, tuple[PromptImage, ...]]:
        """The problem, and its images as the student reads them.

        Raises:
            ImageError: an image cannot be used, or they fill the student's context.
        """
        problem = self._task.train(index)
        images = self._student.prompts.images_of(problem.messages)
        tokens = sum(len(image.features.token_ids) for image in images)
        context = self._student.max_context
        if context is not None and tokens >= context:
            raise ImageError(
                f"its {len(images)} images take {tokens} tokens, "
                f"and the student's context is {context}. Scale them down."
            )
        return problem, images

    def _requests(self, new: Sequence[Delivery]) -> Iterator[ChatRequest]:
        """The tickets as requests: a group's together, where several choices may be asked for."""
        groups: dict[int, list[Delivery]] = {}
        for delivery in new:
            key = delivery.ticket.group if self._several else delivery.number
            groups.setdefault(key, []).append(delivery)
        return map(ChatRequest, groups.values())

    def _body(self, request: ChatRequest) -> dict[str, Any]:
        """The request, in the fields that every OpenAI-compatible endpoint knows.

        Variables of the teacher's chat template are a field of vLLM, SGLang and transformers.
        """
        problem, _ = self._prepared(request.deliveries[0].ticket.index)
        longest = self._settings.inference.sampling.max_completion
        body = {
            "model": self._source.model.name,
            "messages": problem.teacher_messages or problem.messages,
            "max_tokens": self._source.max_completion or longest,
            "temperature": self._source.temperature,
        }
        if len(request.deliveries) > 1:
            body["n"] = len(request.deliveries)
        if arguments := arguments_of(self._source.model, self._settings):
            body["chat_template_kwargs"] = arguments
        return body

    def _finished(self) -> list[tuple[ChatReply, ChatRequest]]:
        """The requests that were answered, in the order in which they were sent."""
        if not self._running:
            return []
        done, _ = wait(self._running, timeout=POLL_S, return_when=FIRST_COMPLETED)
        answered = [reply for reply in self._running if reply in done]
        return [(reply, self._running.pop(reply)) for reply in answered]

    def _outcomes(self, reply: ChatReply, request: ChatRequest) -> list[Outcome]:
        """The outcomes of an answered request; tickets to ask again for go back to the queue."""
        deliveries = request.deliveries
        try:
            answer = reply.result().answer
        except RequestRefused as refusal:
            return self._refused(request, refusal)
        self._budget.spend(total_tokens(answer))
        choices = choices_of(answer)
        if not choices:
            reason = f"the endpoint's answer has no choices: {str(answer)[:200]}"
            return [Outcome(delivery, dead=reason) for delivery in deliveries]
        if request.retry_of_refused or len(choices) < len(deliveries):
            self._ask_one_at_a_time()
        self._queue.extend(ChatRequest([delivery]) for delivery in deliveries[len(choices) :])
        return [
            self._outcome(delivery, choice)
            for delivery, choice in zip(deliveries, choices, strict=False)
        ]

    def _refused(self, request: ChatRequest, refusal: RequestRefused) -> list[Outcome]:
        """Ask again one by one where several choices were refused; else dead letters."""
        deliveries = request.deliveries
        if len(deliveries) > 1:
            # It was refused for the prompt, or for `n`; asking for each alone tells which.
            refused = refusal.status is not None
            self._queue.extend(ChatRequest([delivery], refused) for delivery in deliveries)
            return []
        reason = f"the teacher {self._source.model.name!r}: {refusal}"
        return [Outcome(delivery, dead=reason) for delivery in deliveries]

    def _ask_one_at_a_time(self) -> None:
        if self._several:
            log.info(
                "the endpoint does not give several choices in one answer (n); "
                "asking for one at a time"
            )
            self._several = False

    def _outcome(self, delivery: Delivery, choice: dict[str, Any]) -> Outcome:
        """The rollout of one choice, or why there is none."""
        finish = choice.get("finish_reason")
        if finish == "content_filter":
            return Outcome(delivery, dead="the endpoint's content filter stopped the answer")
        message = choice["message"]
        self._warn_of_reasoning(message)
        ticket = delivery.ticket
        try:
            problem, images = self._prepared(ticket.index)
            reconstructed = self._reconstructor.samples(
                problem.messages,
                [{**message, "role": "assistant"}],
                truncated=finish == "length",
            )
            prompts = [
                self._student.prompts.build(one.prompt_ids, problem.messages, images)
                for one in reconstructed
            ]
            self._require_room(prompts, reconstructed)
        except (ReconstructionError, ImageError) as error:
            return Outcome(delivery, dead=f"the teacher's answer cannot be trained on: {error}")
        self.stats.add("tokens", sum(len(one.completion_ids) for one in reconstructed))
        self._images.add(delivery, prompts[0])
        finish_reason: FinishReason = "length" if finish == "length" else "stop"
        rollout = rollout_of(
            ticket,
            problem,
            prompts[0],
            [_sample(prompt, one) for prompt, one in zip(prompts, reconstructed, strict=True)],
            temperature=self._source.temperature,
            finish_reason=finish_reason,
        )
        return Outcome(delivery, rollout)

    def _warn_of_reasoning(self, message: dict[str, Any]) -> None:
        template = self._reconstructor.template
        reasoning, _ = template.parts(message)
        if reasoning and not template.renders_reasoning():
            self._warn_once(
                "the student's chat template does not render reasoning: the teacher's is left out"
            )

    def _require_room(
        self, prompts: Sequence[Prompt], reconstructed: Sequence[ReconstructedSample]
    ) -> None:
        longest = max(
            len(prompt.ids) + len(one.completion_ids)
            for prompt, one in zip(prompts, reconstructed, strict=True)
        )
        context = self._student.max_context
        if context is not None and longest > context:
            raise ReconstructionError(
                f"it comes to {longest} tokens with its prompt, "
                f"and the student's context is {context}"
            )

    def _warn_once(self, text: str) -> None:
        if text not in self._warned:
            log.warning(text)
            self._warned.add(text)

    def _report(self) -> None:
        """Update what the heartbeat says; a new reason to wait is logged once."""
        self.stats.set(
            running=self._pool.in_flight,
            waiting=_tickets_of(self._queue),
            requests=self._pool.requests,
            failures=self._pool.failures,
        )
        detail = self._pool.problem or self._budget.problem()
        if detail != self.stats.detail:
            log.info(detail or "an endpoint can be asked again")
        self.stats.detail = detail


def _tickets_of(requests: Iterable[ChatRequest]) -> int:
    return sum(len(request.deliveries) for request in requests)


def _sample(prompt: Prompt, reconstructed: ReconstructedSample) -> Sample:
    """A sample that no policy wrote.

    It has no versions, and its generator logprobs are zeros that nothing reads.
    """
    completion_ids = reconstructed.completion_ids
    return Sample(
        prompt_ids=ids_bytes(prompt.ids),
        completion_ids=ids_bytes(completion_ids),
        loss_mask=mask_bytes(reconstructed.loss_mask),
        generator_logprobs=logprobs_bytes([0.0] * len(completion_ids)),
        version_spans=[],
        completion_text=reconstructed.text,
        images=prompt.digests,
    )
