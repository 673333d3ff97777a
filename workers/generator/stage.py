"""The worker that writes rollouts: each ticket's problem, answered by the newest policy version;
and turns of episodes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from jinja2 import TemplateError
from msgspec.structs import replace

from onstream.pipeline.errors import Exit, UserError
from onstream.pipeline.images import ImageError
from onstream.pipeline.prompts import PROMPTS_KEPT, Prompt
from onstream.pipeline.record_codec import ids_bytes
from onstream.pipeline.records import (
    Episode,
    PolicyVersion,
    Rollout,
    StageName,
)
from onstream.pipeline.stage import Delivery, Outcome, Stats
from onstream.pipeline.tasks import Problem, load_task
from onstream.pipeline.telemetry import get_logger
from onstream.pipeline.weights import DirectoryReader, PolicyFetcher, StoreReader
from onstream.pipeline.weights.redis_store import ChunkReader
from onstream.settings.root import Settings
from onstream.workers.generator.engines.base import Completion, GenerationRequest
from onstream.workers.generator.episode_turns import Turn, episode_turns, new_sample, turn_seed
from onstream.workers.generator.guard import Guard, tolerance_of
from onstream.workers.generator.nccl_receiver import ReceivingEngine, TransferReceiver
from onstream.workers.generator.policy_loader import PolicyLoader
from onstream.workers.generator.student import PromptTooLong, open_student
from onstream.workers.generator.tickets import STAGE, ImagesToHold, rollout_of, split_unusable

if TYPE_CHECKING:
    from onstream.pipeline.redis.bus import Bus


log = get_logger()


@dataclass(frozen=True)
class RenderedProblem:
    """A problem and its prompt; `teacher_prompt_ids` is the teacher's, where it reads another."""

    problem: Problem
    prompt: Prompt
    teacher_prompt_ids: bytes | None = None


@dataclass(frozen=True)
class PreparedProblem:
    """A problem as it is asked, and the most tokens that a completion may have."""

    rendered: RenderedProblem
    max_tokens: int


@dataclass(frozen=True)
class ActiveTicket:
    """A ticket whose rollout the engine is writing."""

    delivery: Delivery
    prepared: PreparedProblem


@dataclass(frozen=True)
class ActiveTurn:
    """An episode whose next turn the engine is writing."""

    delivery: Delivery
    turn: Turn


class Generator:
    """Writes rollouts with an engine.

    - Consumes: tickets, and with an environment episodes.
    - Waits for: the policy version that each ticket asks for at least, and a slot of the engine.
    - Is unblocked by: a newer announced version, and completions that end.
    - Produces: rollouts, and episodes with another turn.

    Each `handle` looks for a newer version, then writes one token of every running rollout. While
    the newest version cannot be loaded it takes no tickets, and `stats.detail` says why. If that
    lasts, the generator ends, so that another one gets its tickets.
    """

    name: StageName = STAGE
    holds_entries = False

    def __init__(
        self, settings: Settings, bus: Bus, newest: Callable[[], PolicyVersion | None] | None = None
    ) -> None:
        self.stats = Stats(
            numbers=dict.fromkeys(("policy_version", "running", "waiting", "tokens"), 0.0)
        )
        self._settings = settings
        self._bus = bus
        self._newest = newest or bus.state.newest_policy
        self._images = ImagesToHold(bus.images, settings.delivery.max_handle / 2)
        self._active: dict[int, ActiveTicket | ActiveTurn] = {}  # by the request's key
        self._early: deque[Delivery] = deque()  # tickets for a version that is not loaded yet
        self._last_key = 0

    def setup(self) -> None:
        """Load the task and the student.

        Raises:
            UserError: there is no such task or model, or the engine cannot serve the model.
        """
        self._task = load_task(self._settings)
        self._student = open_student(self._settings)
        self._turns = episode_turns(self._student, self._settings)
        fetcher = PolicyFetcher(self._weight_store(), deltas=self._settings.weights.deltas)
        self._policies = PolicyLoader(
            self._student.engine, fetcher, self._newest, receiver=self._receiver()
        )
        self._rendered = lru_cache(maxsize=PROMPTS_KEPT)(self._render)
        self._guard = Guard(
            self._student.engine,
            interval=self._settings.inference.guard.interval,
            tolerance=tolerance_of(self._settings),
            mixes=self._settings.inference.on_new_weights == "keep",
            family=self._student.model.config.model_type,
        )
        self._update_policy()
        self._report()

    @property
    def room(self) -> int:
        """How many more tickets it takes: those of its slots, and `inference.prefetch` more."""
        engine = self._student.engine
        if self._policies.problem is not None or not engine.slots:
            return 0
        most = engine.slots + self._settings.inference.prefetch
        return max(0, most - engine.active - len(self._early))

    @property
    def busy(self) -> bool:
        """Whether rollouts are being written."""
        return self._student.engine.active > 0

    def handle(self, new: Sequence[Delivery]) -> list[Outcome]:
        """Take the new tickets, load a newer policy if there is one, and write one step.

        A step is one token of every running rollout.

        Raises:
            UserError: tickets have waited `delivery.max_handle` for a version that cannot be
                loaded, or the engine computes another policy than the one that it loaded.
        """
        self._early.extend(new)
        self._update_policy()
        self._require_progress()
        refused = self._start()
        completions = self._guard.take(self._student.engine.step())
        written = [self._outcome(completion) for completion in completions]
        # Before the loop moves the rollouts on: others look for the images that those name.
        self._images.hold()
        self._report()
        return refused + written

    def close(self, *, finished: bool) -> None:
        """Forget the tickets in hand, which the loop gives back, and end the engine."""
        self._active.clear()
        self._early.clear()
        self._student.engine.close()

    def _weight_store(self) -> StoreReader:
        if self._settings.weights.transport == "redis":
            return ChunkReader(self._bus.weights)
        return DirectoryReader(self._settings.run_dir)

    def _receiver(self) -> TransferReceiver | None:
        """The receiving end of transfers from GPU to GPU.

        None without that transport, and where `auto` took another engine than vLLM, which reads
        files.
        """
        engine = self._student.engine
        if self._settings.weights.transport != "nccl" or not isinstance(engine, ReceivingEngine):
            return None
        return TransferReceiver(self._bus.transfer, engine, self._settings.weights.patience)

    def _update_policy(self) -> None:
        self._policies.refresh()
        self._guard.look(self._policies.loaded)

    def _start(self) -> list[Outcome]:
        """Give the engine every ticket whose version is loaded; returns those refused."""
        due = list[Delivery]()
        early = deque[Delivery]()
        for delivery in self._early:
            if delivery.ticket.min_policy_version > self._policies.version:
                early.append(delivery)
            else:
                due.append(delivery)
        self._early = early
        tickets = [delivery for delivery in due if not isinstance(delivery.record, Episode)]
        usable, outcomes = split_unusable(
            tickets, self._prepare, (PromptTooLong, TemplateError, ImageError)
        )
        requests = [self._request(*ticket) for ticket in usable]
        for delivery in due:
            if isinstance(delivery.record, Episode):
                begun = self._begin_turn(delivery, delivery.record)
                if isinstance(begun, Outcome):
                    outcomes.append(begun)
                else:
                    requests.append(begun)
        self._student.engine.add(requests)
        return outcomes

    def _require_progress(self) -> None:
        failing_s = self._policies.failing_s
        if self._early and not self.busy and failing_s > self._settings.delivery.max_handle:
            raise UserError(
                f"{self._policies.problem}, for {failing_s:.0f} s",
                expected="the weights that the trainer announced, within reach of this generator",
                next_step="Check `weights.transport`, and `run.dir` with filesystem; "
                "the tickets in hand go to another generator.",
                exit=Exit.UNREACHABLE,
            )

    def _render(self, index: int) -> RenderedProblem:
        problem = self._task.train(index)
        prompt = self._student.prompt(problem.messages)
        if problem.teacher_messages is None:
            return RenderedProblem(problem, prompt)
        ids = self._student.model.teacher_prompt_ids(problem.teacher_messages)
        return RenderedProblem(problem, prompt, ids_bytes(ids))

    def _prepare(self, index: int) -> PreparedProblem:
        rendered = self._rendered(index)
        # Not cached: the context is the least of the servers', which come and go.
        longest = self._settings.inference.sampling.max_completion
        return PreparedProblem(rendered, self._student.completion_room(rendered.prompt, longest))

    def _request(self, delivery: Delivery, prepared: PreparedProblem) -> GenerationRequest:
        # Not the ticket's number: an entry may be handed out twice, and both be in the engine.
        self._last_key += 1
        self._active[self._last_key] = ActiveTicket(delivery, prepared)
        return GenerationRequest(
            key=self._last_key,
            prompt_ids=prepared.rendered.prompt.ids,
            max_tokens=prepared.max_tokens,
            seed=delivery.ticket.seed,
            temperature=self._settings.inference.sampling.temperature,
            images=prepared.rendered.prompt.images,
        )

    def _begin_turn(self, delivery: Delivery, episode: Episode) -> GenerationRequest | Outcome:
        """The request for the next turn of `episode`; it goes on without one that has no room."""
        try:
            turn = self._turns.next(episode)
        except TemplateError as error:
            return Outcome(delivery, dead=f"the episode cannot be rendered: {error}")
        if not isinstance(turn, Turn):
            if not episode.turns:
                return Outcome(delivery, dead=f"no room for a first turn: {turn}")
            return Outcome(delivery, replace(episode, bound=turn))
        self._last_key += 1
        self._active[self._last_key] = ActiveTurn(delivery, turn)
        return GenerationRequest(
            key=self._last_key,
            prompt_ids=turn.prompt_ids,
            max_tokens=turn.max_tokens,
            seed=turn_seed(episode.ticket.seed, episode.turns),
            temperature=self._settings.inference.sampling.temperature,
        )

    def _outcome(self, completion: Completion) -> Outcome:
        active = self._active.pop(completion.key)
        self.stats.add("tokens", len(completion.token_ids))
        if isinstance(active, ActiveTurn):
            return Outcome(active.delivery, self._turns.after(active.turn, completion))
        self._images.add(active.delivery, active.prepared.rendered.prompt)
        return Outcome(active.delivery, self._rollout(active, completion))

    def _rollout(self, ticket: ActiveTicket, completion: Completion) -> Rollout:
        rendered = ticket.prepared.rendered
        prompt = rendered.prompt
        sample = new_sample(prompt.ids, completion, self._student.text(completion.token_ids))
        sample.images = prompt.digests
        sample.teacher_prompt_ids = rendered.teacher_prompt_ids
        return rollout_of(
            ticket.delivery.ticket,
            rendered.problem,
            prompt,
            [sample],
            temperature=self._settings.inference.sampling.temperature,
            finish_reason=completion.finish_reason,
        )

    def _report(self) -> None:
        """Update what the heartbeat says; a new reason to wait is logged once."""
        self.stats.set(
            policy_version=self._policies.version,
            running=self._student.engine.active,
            waiting=len(self._early),
        )
        detail = self._policies.problem or self._student.engine.problem
        if not detail and self._early:
            wanted = min(delivery.ticket.min_policy_version for delivery in self._early)
            detail = (
                f"waits for policy version {wanted}; "
                f"{self._policies.version} is the newest announced"
            )
        if detail and detail != self.stats.detail:
            log.info(detail)
        self.stats.detail = detail
