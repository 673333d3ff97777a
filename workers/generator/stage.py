"""The worker that writes rollouts: each ticket's problem, answered by the newest policy version."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from onstream.pipeline.errors import Exit, UserError
from onstream.pipeline.images import ImageError
from onstream.pipeline.prompts import PROMPTS_KEPT, Prompt
from onstream.pipeline.records import (
    PolicyVersion,
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
from onstream.pipeline.weights import DirectoryReader, PolicyFetcher, StoreReader
from onstream.pipeline.weights.redis_store import ChunkReader
from onstream.settings.root import Settings
from onstream.workers.generator.engines.base import Completion, GenerationRequest, Sampling
from onstream.workers.generator.guard import Guard, tolerance_of
from onstream.workers.generator.nccl_receiver import ReceivingEngine, TransferReceiver
from onstream.workers.generator.policy_loader import PolicyLoader
from onstream.workers.generator.student import PromptTooLong, open_student

if TYPE_CHECKING:
    from onstream.pipeline.redis.bus import Bus

log = get_logger()


@dataclass(frozen=True)
class ActiveTicket:
    """A ticket in the engine, and what its problem came to."""

    delivery: Delivery
    problem: Problem
    prompt: Prompt


class Generator:
    """Takes tickets; waits for the policy version that each one asks for, and for a slot; produces
    rollouts.

    Each `handle` looks for a newer version, then writes one token of every running rollout. While
    the newest version cannot be loaded it takes no tickets, and `stats.detail` says why; if that
    lasts, it ends, so that another generator gets the tickets that it holds.
    """

    name: StageName = "generate"
    holds_entries = False

    def __init__(
        self, settings: Settings, bus: Bus, newest: Callable[[], PolicyVersion | None] | None = None
    ) -> None:
        # All keys from the start: the heartbeat's thread reads this, and must not meet a dictionary
        # that grows.
        self.stats = Stats(
            numbers=dict.fromkeys(("policy_version", "running", "waiting", "tokens"), 0.0)
        )
        self._settings = settings
        self._bus = bus
        self._newest = newest or bus.state.newest_policy
        self._sampling = Sampling(settings.inference.sampling.temperature)
        self._in_hand: dict[int, ActiveTicket] = {}  # in the engine, by the request's key
        self._early: deque[Delivery] = deque()  # tickets for a version that is not loaded yet
        self._shown: list[Hold] = []  # what the rollouts written just now show
        self._requests = 0

    def setup(self) -> None:
        """Load the task and the student.

        Raises:
            UserError: there is no such task or model, or the engine cannot serve the model.
        """
        self._task = load_task(self._settings)
        self._student = open_student(self._settings)
        reader = PolicyFetcher(self._shelf(), deltas=self._settings.weights.deltas)
        self._policies = PolicyLoader(
            self._student.engine, reader, self._newest, receiver=self._receiver()
        )
        self._asked = lru_cache(maxsize=PROMPTS_KEPT)(self._ask)
        self._guard = Guard(
            self._student.engine,
            interval=self._settings.inference.guard.interval,
            tolerance=tolerance_of(self._settings),
            mixes=self._settings.inference.on_new_weights == "keep",
        )
        self._policies.refresh()
        self._guard.look(self._policies.loaded)
        self._tell()

    @property
    def room(self) -> int:
        """How many more tickets it takes: for its slots, and `inference.prefetch` beyond them."""
        slots = self._student.engine.slots
        if self._policies.problem is not None or not slots:
            return 0
        return max(
            0,
            slots
            + self._settings.inference.prefetch
            - self._student.engine.active
            - len(self._early),
        )

    @property
    def busy(self) -> bool:
        """Whether rollouts are being written."""
        return self._student.engine.active > 0

    def handle(self, new: Sequence[Delivery]) -> list[Outcome]:
        """Take the new tickets, load a newer policy if there is one, and write one token of every
        running rollout.

        Raises:
            UserError: tickets have waited `delivery.max_handle` for a version that cannot be
                loaded, or the engine computes another policy than the one that it loaded.
        """
        self._early.extend(new)
        self._policies.refresh()
        self._guard.look(self._policies.loaded)
        self._require_progress()
        refused = self._start()
        written = [
            self._outcome(completion)
            for completion in self._guard.take(self._student.engine.step())
        ]
        self._hold_images()
        self._tell()
        return refused + written

    def close(self, *, finished: bool) -> None:
        """Forget what is in hand, which the loop gives back, and end the engine."""
        self._in_hand.clear()
        self._early.clear()
        self._student.engine.close()

    def _shelf(self) -> StoreReader:
        return (
            ChunkReader(self._bus.weights)
            if self._settings.weights.transport == "redis"
            else DirectoryReader(self._settings.run_dir)
        )

    def _receiver(self) -> TransferReceiver | None:
        """The end of transfers from GPU to GPU; none where `auto` took another engine than vLLM,
        which reads files.
        """
        engine = self._student.engine
        if self._settings.weights.transport != "nccl" or not isinstance(engine, ReceivingEngine):
            return None
        return TransferReceiver(self._bus.transfer, engine, self._settings.weights.patience)

    def _start(self) -> list[Outcome]:
        """Hand the engine every ticket whose version is there; returns those that cannot be
        answered.
        """
        wait = deque[Delivery]()
        requests = []
        # by problem: a group's is tried once, since an image may take long not to come
        outcomes = list[Outcome]()
        refused = dict[int, str]()
        for delivery in self._early:
            index = delivery.ticket.index
            if delivery.ticket.min_policy_version > self._policies.version:
                wait.append(delivery)
                continue
            try:
                if index not in refused:
                    requests.append(self._request(delivery))
                    continue
            except (PromptTooLong, TemplateError, ImageError) as error:
                refused[index] = f"problem {index} cannot be asked: {error}"
            outcomes.append(Outcome(delivery, dead=refused[index]))
        self._early = wait
        self._student.engine.add(requests)
        return outcomes

    def _require_progress(self) -> None:
        if (
            self._early
            and not self.busy
            and self._policies.failing_s > self._settings.delivery.max_handle
        ):
            raise UserError(
                f"{self._policies.problem}, for {self._policies.failing_s:.0f} s",
                expected="the weights that the trainer announced, within reach of this generator",
                next_step="Check `weights.transport`, and `run.dir` with filesystem; the tickets in hand go to another generator.",
                exit=Exit.UNREACHABLE,
            )

    def _request(self, delivery: Delivery) -> GenerationRequest:
        ticket = delivery.ticket
        problem, prompt = self._asked(ticket.index)
        max_tokens = self._student.completion_room(
            prompt, self._settings.inference.sampling.max_completion
        )
        self._requests += (
            1  # not the ticket's number: an entry that was handed out twice must not meet itself
        )
        self._in_hand[self._requests] = ActiveTicket(delivery, problem, prompt)
        return GenerationRequest(
            self._requests,
            prompt.ids,
            max_tokens,
            ticket.seed,
            self._sampling,
            images=prompt.images,
        )

    def _ask(self, index: int) -> tuple[Problem, Prompt]:
        problem = self._task.train(index)
        return problem, self._student.prompt(problem.messages)

    def _outcome(self, completion: Completion) -> Outcome:
        asked = self._in_hand.pop(completion.key)
        self.stats.add("tokens", len(completion.token_ids))
        if asked.prompt.images:
            self._shown.append(
                Hold(asked.delivery.entry_id, asked.delivery.number, asked.prompt.files)
            )
        return Outcome(asked.delivery, self._rollout(asked, completion))

    def _hold_images(self) -> None:
        """Put the images of what was written into Redis, before the rollouts that name them move
        on.
        """
        self._bus.images.hold(
            self.name, self._shown, patience_s=self._settings.delivery.max_handle / 2
        )
        self._shown.clear()

    def _rollout(self, asked: ActiveTicket, completion: Completion) -> Rollout:
        ticket = asked.delivery.ticket
        sample = Sample(
            prompt_ids=ids_bytes(asked.prompt.ids),
            completion_ids=ids_bytes(completion.token_ids),
            loss_mask=mask_bytes([1] * len(completion.token_ids)),
            generator_logprobs=logprobs_bytes(completion.logprobs),
            version_spans=completion.version_spans,
            completion_text=self._student.text(completion.token_ids),
            images=asked.prompt.digests,
        )
        return Rollout(
            number=ticket.number,
            group=ticket.group,
            group_size=ticket.group_size,
            index=ticket.index,
            messages=asked.prompt.messages,
            info=asked.problem.info,
            samples=[sample],
            temperature=self._sampling.temperature,
            finish_reason=completion.finish_reason,
            route=ticket.route,
        )

    def _tell(self) -> None:
        """What the heartbeat says; a new reason to wait is logged once."""
        engine = self._student.engine
        self.stats.set(
            policy_version=self._policies.version,
            running=engine.active,
            waiting=len(self._early),
        )
        detail = self._policies.problem or engine.problem
        if not detail and self._early:
            wanted = min(delivery.ticket.min_policy_version for delivery in self._early)
            detail = f"waits for policy version {wanted}; {self._policies.version} is the newest announced"
        if detail and detail != self.stats.detail:
            log.info(detail)
        self.stats.detail = detail
