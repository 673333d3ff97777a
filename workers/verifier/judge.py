"""A judge: a model at OpenAI-compatible endpoints that scores answers by a rubric."""

from __future__ import annotations

import hashlib
import queue
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from onstream.pipeline.http import (
    BadReply,
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
from onstream.pipeline.tasks.scorers import answer_text
from onstream.settings.root import Settings
from onstream.workers.verifier.judge_prompt import UnreadableReply, judge_messages, read_judgement
from onstream.workers.verifier.scorer_messages import Verdict

if TYPE_CHECKING:
    from onstream.pipeline.redis.score_store import ScoreStore

SECTION = "orchestrator.judge_model"
PART = "judge"
"""The part of the reward that says that a judge gave it."""


@dataclass(frozen=True)
class JudgeReply:
    """What a judge wrote, and the tokens that were sent and received for it."""

    text: str
    whole: bool
    tokens: int


class Judge:
    """Scores answers over HTTP, many at once. `close` it.

    With a `store` in Redis, a reply that came before for the same question, answer, rubric and
    model is taken from there, and the budget of tokens holds for all workers of the run. While no
    endpoint serves, or the budget is spent, answers wait, and `problem` says for what.
    """

    def __init__(
        self, settings: Settings, store: ScoreStore | None = None, *, patient: bool = False
    ) -> None:
        judge = settings.orchestrator.judge_model
        assert judge is not None, "the rules ask for it"
        self._judge = judge
        self._template_arguments = judge.model.chat_template_kwargs
        self._patient = patient
        self._store = store
        self._kept = settings.orchestrator.score_cache
        self._budget: TokenBudget | None = None
        if store is not None:
            setting = f"{SECTION}.client.max_tokens_per_run"
            most = judge.client.max_tokens_per_run
            self._budget = TokenBudget(store, "verify", most, setting)
        self._pool = EndpointPool(
            judge.client,
            Endpoint,
            model=judge.model.name,
            section=SECTION,
            check=self._check_endpoint,
            conclusive=False,
            role="judge",
        )
        self._thread = EventLoopThread()
        self._new: list[tuple[int, dict[str, Any]]] = []
        self._unsent: deque[tuple[int, dict[str, Any]]] = deque()
        self._asked: dict[int, bytes] = {}
        self._replies: queue.SimpleQueue[tuple[int, Future[EndpointReply[JudgeReply]]]] = (
            queue.SimpleQueue()
        )

    def start(self) -> None:
        """Check the endpoints. One must answer, unless the judge is `patient`.

        Raises:
            UserError: none answers, or one that answers does not serve the model.
        """
        self._thread.run(self._pool.open(patient=self._patient))
        if self._budget is not None:
            self._budget.open()

    @property
    def room(self) -> int:
        """How many more answers it takes: as many as its endpoints take requests."""
        if not self._may_spend:
            return 0
        return max(0, self._pool.capacity - len(self._asked) - len(self._unsent) - len(self._new))

    @property
    def problem(self) -> str:
        """What answers wait for; empty where they do not."""
        spent = self._budget.problem() if self._budget is not None else ""
        return self._pool.problem or spent

    def score(
        self, key: int, question: Sequence[Mapping[str, Any]], answer: str, info: Mapping[str, Any]
    ) -> None:
        """Queue the `answer` to the messages of `question`; `collect` has its verdict by `key`.

        As for other scorers, the answer is what follows `</think>`.
        """
        right = info.get("answer")
        messages = judge_messages(
            self._judge.rubric,
            self._judge.max_score,
            question,
            answer_text(answer),
            None if right is None else str(right),
        )
        body: dict[str, Any] = {
            "model": self._judge.model.name,
            "messages": messages,
            "max_tokens": self._judge.max_completion,
            "temperature": 0.0,
        }
        if self._template_arguments:
            body["chat_template_kwargs"] = self._template_arguments
        self._new.append((key, body))

    def collect(self, wait_s: float) -> list[tuple[int, Verdict]]:
        """The verdicts that came within `wait_s`."""
        known = self._from_store()
        self._send()
        new = self._read(0.0 if known else wait_s)
        if self._budget is not None:
            self._budget.report()
        return known + new

    def close(self) -> None:
        """Drop what is in flight, and close the connections."""
        self._thread.stop(self._pool.close)
        self._new.clear()
        self._unsent.clear()
        self._asked.clear()

    @property
    def _may_spend(self) -> bool:
        return self._budget is None or self._budget.allows()

    async def _check_endpoint(self, endpoint: Endpoint) -> None:
        if not self._judge.client.skip_model_check:
            await require_model(endpoint, self._judge.model.name, SECTION)

    def _from_store(self) -> list[tuple[int, Verdict]]:
        """The verdicts of new answers that were judged before; the others are to be sent."""
        new, self._new = self._new, []
        texts: list[bytes | None] = [None] * len(new)
        if self._store is not None and self._kept:
            texts = self._store.recall([_digest(body) for _, body in new])
        verdicts = []
        for (key, body), text in zip(new, texts, strict=True):
            if text is None:
                self._unsent.append((key, body))
            else:
                verdicts.append((key, self._verdict(text.decode())))
        return verdicts

    def _send(self) -> None:
        while self._unsent and self._may_spend and len(self._asked) < self._pool.capacity:
            key, body = self._unsent.popleft()
            self._asked[key] = _digest(body)
            future = self._thread.submit(self._pool.ask(_ask_for(body)))
            future.add_done_callback(partial(self._done, key))

    def _done(self, key: int, reply: Future[EndpointReply[JudgeReply]]) -> None:
        self._replies.put((key, reply))

    def _read(self, wait_s: float) -> list[tuple[int, Verdict]]:
        """The verdicts of the replies that have come, waiting up to `wait_s` for one."""
        verdicts: list[tuple[int, Verdict]] = []
        while (reply := self._next_reply(0.0 if verdicts else wait_s)) is not None:
            key, future = reply
            verdicts.append((key, self._judged(self._asked.pop(key), future)))
        return verdicts

    def _judged(self, digest: bytes, future: Future[EndpointReply[JudgeReply]]) -> Verdict:
        try:
            said = future.result().answer
        except RequestRefused as refusal:
            return Verdict(unscored=f"the judge: {refusal}")
        if self._budget is not None:
            self._budget.spend(said.tokens)
        if not said.whole:
            bound = f"{SECTION}.max_completion = {self._judge.max_completion}"
            return Verdict(unscored=f"the judge's reply is cut off at {bound} tokens")
        verdict = self._verdict(said.text)
        if verdict.unscored is None and self._store is not None and self._kept:
            self._store.keep([(digest, said.text.encode())], self._kept)
        return verdict

    def _next_reply(self, wait_s: float) -> tuple[int, Future[EndpointReply[JudgeReply]]] | None:
        try:
            return self._replies.get(timeout=wait_s) if wait_s else self._replies.get_nowait()
        except queue.Empty:
            return None

    def _verdict(self, text: str) -> Verdict:
        try:
            reward = read_judgement(text, self._judge.max_score)
        except UnreadableReply as error:
            return Verdict(unscored=f"the judge gave no score: {error}")
        return Verdict(reward, {PART: reward})


def _digest(body: Mapping[str, Any]) -> bytes:
    return hashlib.blake2b(msgspec.json.encode(body, order="sorted"), digest_size=16).digest()


def _ask_for(body: dict[str, Any]) -> Callable[[Endpoint], Coroutine[Any, Any, JudgeReply]]:
    """A function that asks an endpoint for the judgement that `body` asks for."""

    async def ask(endpoint: Endpoint) -> JudgeReply:
        return _reply(await chat_request(body)(endpoint))

    return ask


def _reply(answer: Any) -> JudgeReply:
    """Raises BadReply where `answer` holds no text."""
    choices = choices_of(answer)
    text = choices[0]["message"].get("content") if choices else None
    if not isinstance(text, str):
        raise BadReply("a reply without a text")
    return JudgeReply(text, choices[0].get("finish_reason") != "length", total_tokens(answer))
