"""The external teacher as its worker sees it: requests go out, and replies come in by a thread."""

from __future__ import annotations

import queue
from concurrent.futures import Future
from dataclasses import dataclass

from onstream.pipeline.errors import UserError
from onstream.pipeline.http import EndpointPool, EndpointReply, EventLoopThread
from onstream.pipeline.records import Logprobs
from onstream.settings.chat_templates import arguments_of
from onstream.settings.root import Settings
from onstream.settings.route import local_teacher_configured
from onstream.settings.sections.client import TeacherModelSettings
from onstream.workers.teacher.compatibility import check_own_end
from onstream.workers.teacher.external.endpoint import SECTION, EndpointCheck, TeacherEndpoint
from onstream.workers.teacher.external.student_info import load_student_info
from onstream.workers.teacher.scorer import ScoreRequest, Scores


@dataclass(frozen=True)
class SampleReply:
    """The reply about one sample: the entry of its rollout, its place there, and the result."""

    entry_id: bytes
    at: int
    future: Future[EndpointReply[Scores]]


class TeacherClient:
    """The endpoints of `orchestrator.teacher_model`, checked against the student. `close` it."""

    def __init__(self, settings: Settings, *, patient: bool) -> None:
        """Check every endpoint. One must answer, unless `patient`.

        Raises:
            UserError: none answers, or one that answers cannot be this run's teacher.
        """
        teacher = _teacher_settings(settings)
        self.name = teacher.model.name
        self.student = load_student_info(settings)
        if teacher.model.name != settings.model.name and not local_teacher_configured(settings):
            check_own_end(self.student.model)
        loss = settings.trainer.loss
        most = min(loss.most_top_k, self.student.model.vocabulary_size - 1)
        least = loss.least_top_k(scaled=settings.inference.sampling.temperature != 1)
        self._check = EndpointCheck(
            self.student, teacher, most, min(least, most), arguments_of(teacher.model, settings)
        )
        self._replies: queue.SimpleQueue[SampleReply] = queue.SimpleQueue()
        self._thread = EventLoopThread()
        self.pool = EndpointPool(
            teacher.client,
            TeacherEndpoint,
            model=self.name,
            section=SECTION,
            check=self._check,
            conclusive=True,
        )
        try:
            self._thread.run(self.pool.open(patient=patient))
        except BaseException:
            self.close()
            raise

    @property
    def reference(self) -> Logprobs | None:
        """How the teacher scores the check's text; None until an endpoint has passed the check."""
        return self._check.reference

    @property
    def top_k(self) -> int:
        """How many of the likeliest tokens the endpoint gives that gives most."""
        return self._check.top_k

    def send(self, entry_id: bytes, at: int, request: ScoreRequest) -> None:
        """Ask about sample `at` of the rollout in `entry_id`; the reply comes by `replies`."""
        work = self.pool.ask(lambda endpoint: endpoint.score(request, self.name))
        future = self._thread.submit(work)
        future.add_done_callback(lambda done: self._replies.put(SampleReply(entry_id, at, done)))

    def replies(self, wait_s: float) -> list[SampleReply]:
        """The replies that have come, after waiting up to `wait_s` for the first."""
        replies: list[SampleReply] = []
        try:
            if wait_s:
                replies.append(self._replies.get(timeout=wait_s))
            while True:
                replies.append(self._replies.get_nowait())
        except queue.Empty:
            return replies

    def close(self) -> None:
        """Drop what is in flight, and close the connections."""
        self._thread.stop(self.pool.close)


def _teacher_settings(settings: Settings) -> TeacherModelSettings:
    teacher = settings.orchestrator.teacher_model
    if teacher is None or not teacher.client.base_url or not teacher.model.name:
        raise UserError(
            f"no {SECTION} with a client.base_url and a model.name",
            expected="the address and the model of an external teacher",
            next_step=f'Set {SECTION}.client.base_url = ["http://…/v1"] and {SECTION}.model.name.',
        )
    return teacher
