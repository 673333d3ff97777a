"""The worker that asks a chat endpoint for completions: hard distillation, in which the student is
trained on what a teacher wrote.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from onstream.pipeline.http import (
    Endpoint,
    EndpointPool,
    EndpointReply,
    EventLoopThread,
    RequestRefused,
    TokenBudget,
    decoded,
    require_model,
)
from onstream.pipeline.images import ImageError, PromptImage
from onstream.pipeline.models.tokenizer import load_configs, load_tokenizer
from onstream.pipeline.prompts import PROMPTS_KEPT, Prompt, prompt_builder
from onstream.pipeline.records import (
    Rollout,
    Sample,
    StageName,
    ids_bytes,
    logprobs_bytes,
    mask_bytes,
)
from onstream.pipeline.redis.image_store import Hold
from onstream.pipeline.stage import Delivery, Outcome, Stats
from onstream.pipeline.tasks import Problem, load_task
from onstream.pipeline.telemetry import get_logger
from onstream.settings.root import Settings
from onstream.workers.generator.reconstruction import (
    REASONING_FIELDS,
    ReconstructedSample,
    ReconstructionError,
    Reconstructor,
)
from onstream.workers.generator.student import stop_ids

if TYPE_CHECKING:
    from onstream.pipeline.redis.bus import Bus

SETTING = "orchestrator.teacher_rollout_model"
SLICE_S = 0.05
Reply = Future[EndpointReply[Any]]

log = get_logger()


@dataclass(frozen=True)
class ChatRequest:
    """One request: tickets of one group, a choice for each. `doubts_n` where it is part of a
    request for several that was refused.
    """

    deliveries: list[Delivery]
    doubts_n: bool = False


class ChatGenerator:
    """Takes tickets; waits for answers of the endpoints, which a thread of its own collects;
    produces rollouts that no policy wrote.

    Each `handle` starts requests for new tickets, waits a moment for one to be answered, and turns
    answers into tokens of the student. While no endpoint can be asked it takes no tickets, and
    `stats.detail` says why; those that it holds wait for the endpoints to come back. Past its
    budget of tokens the same.
    """

    name: StageName = "generate"
    holds_entries = False

    def __init__(self, settings: Settings, bus: Bus) -> None:
        source = settings.orchestrator.teacher_rollout_model
        assert source is not None, "the chat generator is for runs with a teacher_rollout_model"
        # All keys from the start: the heartbeat's thread reads this, and must not meet a dictionary
        # that grows.
        self.stats = Stats(
            numbers=dict.fromkeys(("running", "waiting", "tokens", "requests", "failures"), 0.0)
        )
        self._settings = settings
        self._source = source
        self._bus = bus
        client = source.client
        model = source.model.name
        self._pool = EndpointPool(
            client, Endpoint, model=model, section=SETTING, check=self._probe, conclusive=False
        )
        self._budget = TokenBudget(
            bus.scores, self.name, client.max_tokens_per_run, f"{SETTING}.client.max_tokens_per_run"
        )
        self._background = EventLoopThread()
        self._queue: deque[ChatRequest] = deque()
        self._running: dict[Reply, ChatRequest] = {}
        self._shown: list[Hold] = []  # what the rollouts made just now show
        self._several = (
            source.temperature > 0
        )  # whether a request may ask for several choices; all equal when greedy
        self._told: set[str] = set()

    def setup(self) -> None:
        """Load the task and the student's tokenizer, and ask the endpoints whether they serve the
        model.

        Raises:
            UserError: there is no such task or student, or the endpoints cannot be used.
        """
        self._task = load_task(self._settings)
        tokenizer = load_tokenizer(self._settings.model.name)
        config, generation = load_configs(self._settings.model.name)
        self._context: int | None = getattr(
            config.get_text_config(), "max_position_embeddings", None
        )
        self._reconstructor = Reconstructor(
            tokenizer,
            stop_ids(tokenizer, SimpleNamespace(config=config, generation_config=generation)),
        )
        self._prompts = prompt_builder(self._settings.model.name, config, self._settings)
        self._asked = lru_cache(maxsize=PROMPTS_KEPT)(self._look)
        # A run that had completions before waits for its endpoints; one that begins is told of a
        # wrong address at once.
        self._background.run(self._pool.open(patient=self.name in self._bus.state.ready_stages()))
        self._budget.open()
        self._tell()

    @property
    def room(self) -> int:
        """How many more tickets it takes: as many groups as the endpoints take requests, or tickets
        where each is a request.
        """
        if not self._budget.allows():
            return 0
        at_once = self._pool.capacity * (
            self._settings.orchestrator.group_size if self._several else 1
        )
        return max(0, at_once - self._in_hand)

    @property
    def busy(self) -> bool:
        """Whether answers may come soon. Past the budget, what was not asked waits."""
        return bool(self._running) or (bool(self._queue) and self._may_ask)

    def handle(self, new: Sequence[Delivery]) -> list[Outcome]:
        """Ask for the new tickets' completions, and return those that have come."""
        refused = self._unusable(new)
        self._queue.extend(
            self._jobs([delivery for delivery in new if delivery.entry_id not in refused])
        )
        while self._queue and self._may_ask:
            job = self._queue.popleft()
            self._running[
                self._background.submit(self._pool.ask(_completions(self._body(job))))
            ] = job
        outcomes = [
            outcome for reply, job in self._finished() for outcome in self._outcomes(reply, job)
        ]
        self._budget.report()
        self._bus.images.hold(
            self.name, self._shown, patience_s=self._settings.delivery.max_handle / 2
        )
        self._shown.clear()
        self._tell()
        return [*refused.values(), *outcomes]

    def close(self, *, finished: bool) -> None:
        """Forget what is in hand; the loop gives it back."""
        self._background.stop(self._pool.close)
        self._running.clear()
        self._queue.clear()

    async def _probe(self, endpoint: Endpoint) -> None:
        """What must hold of an endpoint, at the start and when it comes back."""
        if not self._source.client.skip_model_check:
            await require_model(endpoint, self._source.model.name, SETTING)

    @property
    def _may_ask(self) -> bool:
        return len(self._running) < self._pool.capacity and self._budget.allows()

    @property
    def _in_hand(self) -> int:
        return sum(len(job.deliveries) for job in (*self._queue, *self._running.values()))

    def _look(self, index: int) -> tuple[Problem, tuple[PromptImage, ...]]:
        """The problem, and its images as the student reads them. Raises ImageError where one cannot
        be used.
        """
        problem = self._task.train(index)
        images = self._prompts.images_of(problem.messages)
        tokens = sum(len(image.features.token_ids) for image in images)
        if self._context is not None and tokens >= self._context:
            raise ImageError(
                f"its {len(images)} images take {tokens} tokens, and the student's context is {self._context}. Scale them down."
            )
        return problem, images

    def _unusable(self, new: Sequence[Delivery]) -> dict[bytes, Outcome]:
        """The tickets whose images cannot be used, by entry."""
        # a group's is tried once: an image may take long not to come
        refused = dict[bytes, Outcome]()
        reasons = dict[int, str]()
        for delivery in new:
            index = delivery.ticket.index
            try:
                if index not in reasons:
                    self._asked(index)
                    continue
            except ImageError as error:
                reasons[index] = f"problem {index} cannot be asked: {error}"
            refused[delivery.entry_id] = Outcome(delivery, dead=reasons[index])
        return refused

    def _jobs(self, new: Sequence[Delivery]) -> Iterator[ChatRequest]:
        """The tickets as requests: those of a group together, where several choices may be asked
        for.
        """
        groups: dict[int, list[Delivery]] = {}
        for delivery in new:
            groups.setdefault(
                delivery.ticket.group if self._several else delivery.number, []
            ).append(delivery)
        return map(ChatRequest, groups.values())

    def _body(self, job: ChatRequest) -> dict[str, Any]:
        """The request, in the fields that every OpenAI-compatible endpoint knows."""
        body = {
            "model": self._source.model.name,
            "messages": self._asked(job.deliveries[0].ticket.index)[0].messages,
            "max_tokens": self._source.max_completion
            or self._settings.inference.sampling.max_completion,
            "temperature": self._source.temperature,
        }
        return body | ({"n": len(job.deliveries)} if len(job.deliveries) > 1 else {})

    def _finished(self) -> list[tuple[Reply, ChatRequest]]:
        if not self._running:
            return []
        done, _ = wait(self._running, timeout=SLICE_S, return_when=FIRST_COMPLETED)
        return [
            (reply, self._running.pop(reply))
            for reply in [reply for reply in self._running if reply in done]
        ]

    def _outcomes(self, reply: Reply, job: ChatRequest) -> list[Outcome]:
        """What becomes of an answered request's tickets; those that another request is to answer go
        back to the queue.
        """
        try:
            answer = reply.result().answer
        except RequestRefused as refusal:
            if len(job.deliveries) > 1:  # for the prompt, or for n: each alone will show
                self._queue.extend(
                    ChatRequest([delivery], doubts_n=refusal.status is not None)
                    for delivery in job.deliveries
                )
                return []
            return [
                Outcome(delivery, dead=f"the teacher {self._source.model.name!r}: {refusal}")
                for delivery in job.deliveries
            ]
        self._budget.spend(_tokens(answer))
        choices = _choices(answer)
        if job.doubts_n and choices:
            self._ask_one_at_a_time()
        if choices and len(choices) < len(job.deliveries):
            self._ask_one_at_a_time()
            self._queue.extend(
                ChatRequest([delivery]) for delivery in job.deliveries[len(choices) :]
            )
        elif not choices:
            return [
                Outcome(delivery, dead=f"the endpoint's answer has no choices: {str(answer)[:200]}")
                for delivery in job.deliveries
            ]
        return [
            self._outcome(delivery, choice)
            for delivery, choice in zip(job.deliveries, choices, strict=False)
        ]

    def _ask_one_at_a_time(self) -> None:
        if self._several:
            log.info(
                "the endpoint does not give several choices in one answer (n); asking for one at a time"
            )
            self._several = False

    def _outcome(self, delivery: Delivery, choice: dict[str, Any]) -> Outcome:
        """The rollout of one choice, or why there is none."""
        finish = choice.get("finish_reason")
        message = choice["message"]
        if finish == "content_filter":
            return Outcome(delivery, dead="the endpoint's content filter stopped the answer")
        if not self._reconstructor.renders_reasoning() and any(
            message.get(name) for name in REASONING_FIELDS
        ):
            self._tell_once(
                "the student's chat template does not render reasoning: the teacher's is left out"
            )
        ticket = delivery.ticket
        written = [{**message, "role": "assistant"}]
        try:
            problem, images = self._asked(ticket.index)
            samples = self._reconstructor.samples(
                problem.messages, written, truncated=finish == "length"
            )
            prompts = [
                self._prompts.build(sample.prompt_ids, problem.messages, images)
                for sample in samples
            ]
            self._require_room(prompts, samples)
        except (ReconstructionError, ImageError) as error:
            return Outcome(delivery, dead=f"the teacher's answer cannot be trained on: {error}")
        self.stats.add("tokens", sum(len(sample.completion_ids) for sample in samples))
        if images:
            self._shown.append(Hold(delivery.entry_id, delivery.number, prompts[0].files))
        rollout = Rollout(
            number=ticket.number,
            group=ticket.group,
            group_size=ticket.group_size,
            index=ticket.index,
            messages=prompts[0].messages,
            info=problem.info,
            samples=[
                _sample(prompt, sample) for prompt, sample in zip(prompts, samples, strict=True)
            ],
            temperature=self._source.temperature,
            finish_reason="length" if finish == "length" else "stop",
            route=list(ticket.route),
        )
        return Outcome(delivery, rollout)

    def _require_room(
        self, prompts: Sequence[Prompt], samples: Sequence[ReconstructedSample]
    ) -> None:
        longest = max(
            len(prompt.ids) + len(sample.completion_ids)
            for prompt, sample in zip(prompts, samples, strict=True)
        )
        if self._context is not None and longest > self._context:
            raise ReconstructionError(
                f"it comes to {longest} tokens with its prompt, and the student's context is {self._context}"
            )

    def _tell_once(self, words: str) -> None:
        if words not in self._told:
            log.warning(words)
            self._told.add(words)

    def _tell(self) -> None:
        """What the heartbeat says; a new reason to wait is logged once."""
        in_requests = sum(len(job.deliveries) for job in self._running.values())
        self.stats.set(
            running=self._pool.in_flight,
            waiting=self._in_hand - in_requests,
            requests=self._pool.requests,
            failures=self._pool.failures,
        )
        detail = self._pool.problem or self._budget.problem()
        if detail != self.stats.detail:
            log.info(detail or "an endpoint can be asked again")
        self.stats.detail = detail


def _completions(body: dict[str, Any]) -> Callable[[Endpoint], Awaitable[Any]]:
    """The question for the completions of `body`."""

    async def ask(endpoint: Endpoint) -> Any:
        return decoded(await endpoint.post("/v1/chat/completions", body))

    return ask


def _tokens(answer: Any) -> int:
    """The tokens that an answer says were read and written."""
    usage = answer.get("usage") if isinstance(answer, dict) else None
    total = usage.get("total_tokens") if isinstance(usage, dict) else None
    return total if isinstance(total, int) else 0


def _choices(answer: Any) -> list[dict[str, Any]]:
    """The choices of an answer that hold a message."""
    choices = answer.get("choices") if isinstance(answer, dict) else None
    return [
        choice
        for choice in choices or ()
        if isinstance(choice, dict) and isinstance(choice.get("message"), dict)
    ]


def _sample(prompt: Prompt, made: ReconstructedSample) -> Sample:
    """No policy wrote it: it has no versions, and its generator logprobs are zeros that nothing
    reads.
    """
    return Sample(
        prompt_ids=ids_bytes(prompt.ids),
        completion_ids=ids_bytes(made.completion_ids),
        loss_mask=mask_bytes(made.loss_mask),
        generator_logprobs=logprobs_bytes([0.0] * len(made.completion_ids)),
        version_spans=[],
        completion_text=made.text,
        images=prompt.digests,
    )
