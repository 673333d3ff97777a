"""What `onstream replay` says, writes and exits with."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console

from onstream.pipeline.errors import Exit, UserError
from onstream.pipeline.record_codec import ids_bytes, logprobs_bytes
from onstream.pipeline.records import PolicyVersion, Rollout, Ticket
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.run_files import recording
from onstream.pipeline.run_files.recording import (
    Recorder,
    RecordFrame,
    ResumeMark,
    StepMark,
    frames,
)
from onstream.workers.replay.output import JsonOutput, ReplayOutput, TableOutput
from onstream.workers.replay.player import ReplayedStep
from onstream.workers.replay.replay import replay
from onstream.workers.replay.result import FIGURES
from onstream.workers.trainer.losses.row_loss import PerSampleLosses
from tests.tiny import write_tiny
from tests.workers.trainer.driver import Run, rollout

EQUAL = "the weights after each of them equal the recorded ones, bit for bit; so do the metrics"


@pytest.fixture(scope="module")
def recorded(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run of six steps that was recorded, with checkpoints of the steps 2, 4 and
    6.
    """
    directory = tmp_path_factory.mktemp("recorded")
    bus = Bus.connect(redis_url, "recorded", consumer="tester", block_s=0.2, connect_timeout_s=5)
    job = Run(
        bus, write_tiny(directory / "student"), directory, trainer__record=True, checkpoint__keep=9
    )
    job.ready()
    job.to_the_end()
    job.close_files()
    bus.close()
    return directory / "recorded"


class Command:
    """The command on one run, and all that it said."""

    def __init__(self, run: Path, out: Path) -> None:
        self.run = run
        self.out = out
        self.said = list[str]()

    def __call__(
        self,
        *overrides: str,
        from_step: int | None = None,
        stop_at: int | None = None,
        worst: int = 0,
    ) -> Exit:
        return replay(
            self.run,
            overrides,
            from_step=from_step,
            stop_at=stop_at,
            out=self.out,
            worst=worst,
            output=ReplayOutput(self.said.append),
        )

    def rows(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.out / name).read_text().splitlines()]

    @property
    def text(self) -> str:
        return "\n".join(self.said)


@pytest.fixture
def command(recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """The command, on a copy of the recorded run that a test may harm."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    shutil.copytree(recorded, tmp_path / "run")
    return Command(tmp_path / "run", tmp_path / "again")


def rewrite(run: Path, change: Callable[[Any], Any]) -> None:
    """Write the recording anew, each frame as `change` gives it."""
    story = [change(frame) for frame in frames(run / recording.FOLDER)]
    recorder = Recorder(run / recording.FOLDER, 0)
    for frame in story:
        if isinstance(frame, RecordFrame):
            recorder.record(frame.number, frame.taken, frame.payload)
        else:
            recorder.mark(frame, 0.0)
    recorder.close()


def test_a_replay_reproduces_weights_metrics_and_checkpoint_with_nobody_else_at_work(
    command: Command,
) -> None:
    assert command() is Exit.OK
    assert command.said[0] == f"replays {command.run} from the start of the run"
    assert f"steps 1 to 6: {EQUAL}" in command.said
    for name in ("checkpoints/step-000006/model.safetensors", "policies/000006/model.safetensors"):
        assert (command.out / name).read_bytes() == (command.run / name).read_bytes()
    theirs = [json.loads(line) for line in (command.run / "metrics.jsonl").read_text().splitlines()]
    for mine, other in zip(command.rows("metrics.jsonl"), theirs, strict=True):
        assert {name: other[name] for name in mine if name != "time"} == {
            name: mine[name] for name in mine if name != "time"
        }
    assert [line["same_weights"] for line in command.rows("replay.jsonl")] == [True] * 6
    assert not (command.out / recording.FOLDER).exists()


def test_every_rollout_of_every_step_is_written_down_with_its_part_in_the_loss(
    command: Command,
) -> None:
    command(stop_at=2, worst=3)
    rows = command.rows("samples.jsonl")
    assert [sum(row["step"] == step for row in rows) for step in (1, 2)] == [8, 8]
    first = rows[:8]
    metrics = command.rows("metrics.jsonl")[0]
    assert sum(row["loss"] for row in first) / metrics["tokens"] == pytest.approx(
        metrics["loss"], rel=1e-5
    )
    assert sum(row["loss_share"] for row in first) == pytest.approx(1)
    assert max(row["mismatch_max"] for row in first) == pytest.approx(metrics["mismatch_max"])
    worst = max(rows[8:], key=lambda row: row["loss_share"])
    (shown,) = [text for text in command.said if text.startswith("step 2:")]
    assert "the 3 samples with the largest part in its loss, of 8:" in shown
    assert shown.split("of 8:\n")[1].split()[0] == worst["uid"]


@pytest.mark.parametrize(
    ("from_step", "first"), [(1, 1), (2, 1), (3, 3), (4, 3), (5, 5), (99, None)]
)
def test_a_replay_starts_from_the_newest_checkpoint_before_the_step_wanted(
    command: Command, from_step: int, first: int | None
) -> None:
    if first is None:
        with pytest.raises(UserError, match="no step was replayed from step 6 on"):
            command(from_step=from_step)
        return
    assert command(from_step=from_step) is Exit.OK
    assert f"steps {first} to 6: {EQUAL}" in command.said
    assert (
        "checkpoint step-000006 has the same weights and optimizer state, byte for byte"
        in command.text
    )


def test_a_replay_stops_at_the_step_wanted(command: Command) -> None:
    assert command(from_step=4, stop_at=4) is Exit.OK
    assert [row["step"] for row in command.rows("metrics.jsonl")] == [3, 4]
    assert "checkpoint step-000004 has the same weights" in command.text


def test_a_recording_of_an_earlier_version_is_compared_by_the_digests_of_its_files(
    command: Command,
) -> None:
    """Until the digest was a tree over the tensors, it was the SHA-256 of the version's file."""

    def by_file(frame: recording.Frame) -> recording.Frame:
        if isinstance(frame, RecordFrame):
            return frame
        weights = command.run / f"policies/{frame.step:06d}/model.safetensors"
        if not weights.exists():
            return frame
        digest = hashlib.sha256(weights.read_bytes()).hexdigest()
        return msgspec.structs.replace(frame, digest=digest)

    rewrite(command.run, by_file)
    command()  # its shorter digests make the recording end before the length that is noted
    assert f"steps 1 to 6: {EQUAL}" in command.said


def test_the_first_step_that_differs_is_named_and_the_exit_code_is_1(command: Command) -> None:
    rewrite(
        command.run,
        lambda frame: (
            msgspec.structs.replace(frame, digest="0" * 64)
            if isinstance(frame, StepMark) and frame.step == 4
            else frame
        ),
    )
    assert command() is Exit.FAILED
    assert (
        "steps 1 to 6: the weights differ from the recorded ones, first after step 4; "
        "the metrics are the same"
    ) in command.said
    assert [line["step"] for line in command.rows("replay.jsonl") if not line["same_weights"]] == [
        4
    ]


def test_another_student_under_the_recorded_name_is_told_before_the_first_step(
    command: Command, recorded: Path, tmp_path: Path
) -> None:
    write_tiny(tmp_path / "other", seed=1)
    settings = command.run / recording.FOLDER / "settings.toml"
    settings.write_text(
        settings.read_text().replace(str(recorded.parent / "student"), str(tmp_path / "other"))
    )
    assert command() is Exit.FAILED
    assert command.said[1] == (
        "the weights that the recorded run started from are not those that this replay starts from"
    )
    assert "first after step 1" in command.text


def test_a_record_that_is_missing_is_told_by_the_step_that_is_not_due(command: Command) -> None:
    story = list(frames(command.run / recording.FOLDER))
    gone = max(at for at, frame in enumerate(story) if isinstance(frame, RecordFrame))
    recorder = Recorder(command.run / recording.FOLDER, 0)
    for at, frame in enumerate(story):
        if isinstance(frame, RecordFrame) and at != gone:
            recorder.record(frame.number, frame.taken, frame.payload)
        elif isinstance(frame, ResumeMark | StepMark):
            recorder.mark(frame, 0.0)
    recorder.close()
    for folder in (command.run / "checkpoints").iterdir():
        shutil.rmtree(folder)  # they name places of the whole recording
    assert command() is Exit.FAILED
    assert (
        "step 6 was recorded at a place of the stream where no batch was complete here"
        in command.said
    )


def test_a_changed_setting_is_a_what_if_and_its_difference_no_fault(command: Command) -> None:
    assert command("trainer.optim.lr=0.01", from_step=5) is Exit.OK
    assert "what if: trainer.optim.lr is 0.01 instead of 0.001" in command.said
    assert "differs by intent: trainer.optim.lr" in command.said
    assert "lr                      0.01  (recorded: 0.001)" in command.text


def test_a_setting_set_to_what_was_recorded_is_no_what_if(command: Command) -> None:
    assert command("trainer.optim.lr=0.001", stop_at=1) is Exit.OK
    assert "what if" not in command.text


@pytest.mark.parametrize(
    "override", ["orchestrator.batch_size=4", "trainer.record=true", "run.name=other"]
)
def test_a_setting_that_a_replay_cannot_change_is_refused(command: Command, override: str) -> None:
    with pytest.raises(UserError, match="expected a setting of the trainer"):
        command(override)
    assert not command.out.exists()


def test_other_conditions_are_named(command: Command) -> None:
    def elsewhere(frame: Any) -> Any:
        changed = (
            {"conditions": {**frame.conditions, "torch": "1.0"}}
            if isinstance(frame, ResumeMark)
            else {}
        )
        return msgspec.structs.replace(frame, **changed) if changed else frame

    rewrite(command.run, elsewhere)
    assert command(stop_at=1) is Exit.OK
    assert "torch was 1.0 when step 1 was recorded, and is " in command.said[1]


def test_damage_ends_the_replay_after_the_steps_before_it(command: Command) -> None:
    path = command.run / recording.FOLDER / "000000000000000.segment"
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3] ^= 1
    path.write_bytes(data)
    assert command() is Exit.FAILED
    assert "the replay ends there: " in command.text and "damaged at byte" in command.text
    assert "bit for bit" in command.text
    last = command.rows("metrics.jsonl")[-1]["step"]
    assert 2 <= last < 6
    shutil.rmtree(command.out)
    with pytest.raises(UserError, match=r"damaged at byte .* Give an earlier --from-step"):
        command(from_step=6)


def test_a_damaged_checkpoint_is_refused_by_name(command: Command) -> None:
    (command.run / "checkpoints/step-000004/model.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"step-000004: model.safetensors does not have the digest"):
        command(from_step=5)


def test_a_run_that_was_not_recorded_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no recording/; .*trainer.record = true"):
        replay(
            tmp_path,
            [],
            from_step=None,
            stop_at=None,
            out=None,
            worst=0,
            output=ReplayOutput(print),
        )


def test_an_existing_directory_is_not_written_over(command: Command) -> None:
    command.out.mkdir()
    with pytest.raises(UserError, match="expected a directory to be made"):
        command()


def test_replays_go_beside_their_run_by_default_each_to_its_own_directory(command: Command) -> None:
    command.out = None  # type: ignore[assignment]
    command(stop_at=1)
    command(stop_at=1)
    assert sorted(path.name for path in command.run.parent.glob("run*")) == [
        "run",
        "run-replay",
        "run-replay-2",
    ]


def test_on_a_terminal_the_last_step_is_in_tables_and_json_has_it_all(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    text = io.StringIO()
    wide = Console(file=text, width=160, force_terminal=True, color_system=None)
    arguments: dict[str, Any] = {"from_step": None, "stop_at": 2, "worst": 2}
    outputs = (TableOutput(wide), JsonOutput())
    for at, output in enumerate(outputs):
        out = command.out.with_name(f"out-{at}")
        assert replay(command.run, [], out=out, output=output, **arguments) is Exit.OK
    rows = [line.split() for line in text.getvalue().splitlines()]
    assert ["step", "2", "replayed", "recorded", "where", "other"] in rows
    assert ["rollouts", "8"] in rows
    assert ["rollout", *FIGURES, "completion"] in rows
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert (result["steps"], result["equal"], result["metrics"]["step"]) == ([1, 2], True, 2)
    assert len(result["samples"]) == 2
    assert "steps 1 to 2: " in printed.err


def test_a_metric_that_the_version_before_did_not_have_is_no_difference() -> None:
    row = {"loss": 0.5, "teacher_top_k": 8.0}
    policy = PolicyVersion(1, "a", "policies/000001", 10)
    for recorded, other in (({"loss": 0.5}, []), ({"loss": 0.25}, ["loss"])):
        mark = StepMark(1, "a", recorded)
        step = ReplayedStep(policy, row, mark, True, [], PerSampleLosses())
        assert step.other_metrics == other


def of_unlike_teachers(ticket: Ticket, version: int) -> Rollout:
    """A rollout with 2, 1 or none of the teacher's alternatives at each token."""
    made = rollout(ticket, version)
    [sample] = made.samples
    tokens = len(sample.loss_mask)
    if k := ticket.number % 3:
        sample.teacher_top_ids = ids_bytes([4, 5][:k] * tokens)
        sample.teacher_top_logprobs = logprobs_bytes([-1.0, -1.5][:k] * tokens)
    return made


def test_a_run_whose_teachers_gave_unlike_numbers_of_alternatives_is_replayed_bit_for_bit(
    bus: Bus, tmp_path: Path
) -> None:
    student = write_tiny(tmp_path / "student")
    changes = {
        "trainer__record": True,
        "trainer__loss__teacher_tau": 1.0,
        "trainer__max_steps": 2,
        "teacher_inference__model__name": str(student),
    }
    job = Run(bus, student, tmp_path, **changes)
    job.ready()
    bus.state.mark_ready("score")
    job.to_the_end(of_unlike_teachers)
    assert all(0 < row["teacher_top_k"] < 2 for row in job.rows())
    job.close_files()
    command = Command(tmp_path / bus.run, tmp_path / "again")
    assert command() is Exit.OK
    assert f"steps 1 to 2: {EQUAL}" in command.said
