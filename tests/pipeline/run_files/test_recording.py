"""A recording: what was appended comes back in order, cut where a checkpoint says, and damage is
told from a writer's death.
"""

from __future__ import annotations

import resource
import signal
from pathlib import Path

import pytest

from onstream.pipeline.run_files import recording
from onstream.pipeline.run_files.recording import (
    Frame,
    Recorder,
    RecordFrame,
    RecordingError,
    ResumeMark,
    StepMark,
    frames,
)

OPENED = ResumeMark(0, "d0", {"trainer.optim.lr": 1e-3}, {"threads": 1})


def record(number: int) -> RecordFrame:
    return RecordFrame(number, 1000.0 + number, bytes([number]) * 50)


def write(recorder: Recorder, *written: Frame) -> list[int]:
    """Append `written`; returns the position after each."""
    positions = []
    for frame in written:
        if isinstance(frame, RecordFrame):
            recorder.record(frame.number, frame.taken, frame.payload)
        else:
            recorder.mark(frame, 1000.0)
        positions.append(recorder.position)
    return positions


@pytest.fixture
def story() -> list[Frame]:
    return [
        OPENED,
        record(1),
        record(2),
        StepMark(1, "d1", {"loss": 0.5, "reward": None}),
        record(3),
        record(4),
    ]


@pytest.fixture(params=[recording.SEGMENT_BYTES, 100], ids=["one segment", "many segments"])
def written(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    story: list[Frame],
) -> list[int]:
    """The story, recorded in tmp_path; the positions after each frame."""
    monkeypatch.setattr(recording, "SEGMENT_BYTES", request.param)
    recorder = Recorder(tmp_path, 0)
    positions = write(recorder, *story)
    recorder.sync()
    recorder.close()
    assert (len(list(tmp_path.glob("*.segment"))) > 1) == (request.param == 100)
    return positions


def test_what_was_recorded_comes_back_in_order(
    tmp_path: Path, story: list[Frame], written: list[int]
) -> None:
    assert list(frames(tmp_path)) == story
    assert recording.size_bytes(tmp_path) == written[-1]


def test_reading_starts_and_ends_at_the_positions_that_the_recorder_gave(
    tmp_path: Path, story: list[Frame], written: list[int]
) -> None:
    for at, position in enumerate(written, 1):
        assert list(frames(tmp_path, position)) == story[at:]
        assert list(frames(tmp_path, end=position)) == story[:at]


def test_a_recorder_cuts_back_to_what_a_checkpoint_knows_and_goes_on(
    tmp_path: Path, story: list[Frame], written: list[int]
) -> None:
    recorder = Recorder(tmp_path, written[2])
    assert recorder.position == written[2]
    write(recorder, record(7))
    recorder.close()
    assert list(frames(tmp_path)) == [*story[:3], record(7)]


def test_a_recorder_that_starts_anew_leaves_nothing_of_the_former_one(
    tmp_path: Path, written: list[int]
) -> None:
    recorder = Recorder(tmp_path, 0)
    write(recorder, record(9))
    recorder.close()
    assert list(frames(tmp_path)) == [record(9)]


@pytest.mark.parametrize("lost_bytes", [1, 49, 51, 60])
def test_a_frame_left_unfinished_is_left_out(
    tmp_path: Path, story: list[Frame], written: list[int], lost_bytes: int
) -> None:
    cut_last(tmp_path, lost_bytes)
    assert list(frames(tmp_path)) == story[:-1]
    assert list(frames(tmp_path, durable=written[-2])) == story[:-1]


def test_a_frame_that_a_checkpoint_knows_and_the_file_lacks_is_damage(
    tmp_path: Path, written: list[int]
) -> None:
    cut_last(tmp_path, 1)
    with pytest.raises(RecordingError, match="damaged at byte"):
        list(frames(tmp_path, durable=written[-1]))


def test_a_recording_that_ends_before_what_a_checkpoint_knows_is_damaged(
    tmp_path: Path, story: list[Frame]
) -> None:
    recorder = Recorder(tmp_path, 0)
    *_, size = write(recorder, *story)
    recorder.close()
    with pytest.raises(
        RecordingError, match=f"has {size} bytes; a checkpoint of the run names {size + 70}"
    ):
        list(frames(tmp_path, durable=size + 70))


@pytest.mark.parametrize("back", [1, 40, 60, 75])
def test_a_flipped_bit_is_told_by_file_and_byte(
    tmp_path: Path, story: list[Frame], written: list[int], back: int
) -> None:
    path = max(tmp_path.glob("*.segment"))
    data = bytearray(path.read_bytes())
    data[-back] ^= 1
    path.write_bytes(data)
    got: list[Frame] = []
    with pytest.raises(RecordingError, match=rf"{path.name}.* damaged at byte \d+"):
        got += frames(tmp_path, durable=written[-1])


def test_a_missing_segment_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, story: list[Frame]
) -> None:
    monkeypatch.setattr(recording, "SEGMENT_BYTES", 100)
    recorder = Recorder(tmp_path, 0)
    write(recorder, *story)
    recorder.close()
    sorted(tmp_path.glob("*.segment"))[1].unlink()
    with pytest.raises(RecordingError, match="a segment is missing"):
        list(frames(tmp_path))


def test_a_kind_of_a_later_version_is_refused_and_not_skipped(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, 0)
    recorder._append(9, 0.0, 1, b"an image, say")
    recorder.close()
    with pytest.raises(RecordingError, match="kind 9, which this version does not know"):
        list(frames(tmp_path))


def test_a_file_of_another_version_is_refused_by_its_heading(tmp_path: Path) -> None:
    (tmp_path / "000000000000000.segment").write_bytes(b"onstream recording 2\n" + bytes(60))
    with pytest.raises(RecordingError, match="does not begin with 'onstream recording 1'"):
        list(frames(tmp_path))


def test_what_is_recorded_is_out_of_the_process_at_once(tmp_path: Path, story: list[Frame]) -> None:
    recorder = Recorder(tmp_path, 0)
    write(recorder, *story)
    assert list(frames(tmp_path)) == story, (
        "a trainer that was replaced leaves nothing behind that it would write at its end"
    )
    recorder.close()


def test_a_frame_that_the_disk_takes_in_part_is_taken_back(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, 0)
    (size,) = write(recorder, record(1))
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (size + 30, former[1])
    )  # to the writer the same as a full disk: a short write
    try:
        with pytest.raises(OSError):
            write(recorder, record(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
        signal.signal(signal.SIGXFSZ, handler)
    assert recording.size_bytes(tmp_path) == size
    write(recorder, record(3))
    recorder.close()
    assert list(frames(tmp_path)) == [record(1), record(3)]


def test_a_directory_without_segments_holds_no_recording(tmp_path: Path) -> None:
    assert not recording.exists(tmp_path) and recording.size_bytes(tmp_path) == 0
    assert list(frames(tmp_path)) == []


def cut_last(directory: Path, count: int) -> None:
    path = max(directory.glob("*.segment"))
    path.write_bytes(path.read_bytes()[:-count])
