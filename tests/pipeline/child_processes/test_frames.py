"""The frames that a worker and its children speak in."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onstream.pipeline.child_processes.frames import FrameError, Frames
from onstream.pipeline.child_processes.messages import LENGTH


@given(st.lists(st.binary(max_size=50)), st.lists(st.integers(1, 30)))
def test_frames_come_back_however_the_stream_was_cut(bodies: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(LENGTH.pack(len(body)) + body for body in bodies)
    frames = Frames(1 << 10)
    found = []
    for cut in [*cuts, len(stream)]:
        found += list(frames.feed(stream[:cut]))
        stream = stream[cut:]
    assert found == bodies


def test_a_frame_over_the_bound_is_refused_by_its_length_alone() -> None:
    with pytest.raises(FrameError, match="a frame of 1025 bytes; expected at most 1024"):
        list(Frames(1 << 10).feed(LENGTH.pack(1025)))
