"""A vision-language student on its own answers: from chance to reading pictures as its teacher
does, and wrong where it is shown others.
"""

from __future__ import annotations

from math import sqrt
from pathlib import Path

import pytest

from onstream.settings.load import load_settings
from onstream.workers.launcher.open_run import open_run
from tests.modes.run import ROOT, Run

PAIR = ROOT / "examples/colour-words"
CHANCE = 1 / 36  # two of six colours

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def likely(share: float, samples: int) -> float:
    """The most that a share of `samples` answers comes to, but for one time in a thousand, where
    each is right with probability `share`.
    """
    return share + 3.1 * sqrt(share * (1 - share) / samples)


@pytest.mark.rotates("students that learn to read pictures", 0, 3)
def test_a_student_that_sees_learns_to_read_pictures_from_its_teacher(tmp_path: Path) -> None:
    run = Run(tmp_path, PAIR / "onstream.toml", f"model.name={PAIR / 'student'}")
    summary = run.up()
    before, after = run.rows("evals.jsonl")
    print(
        f"exact: {before['exact']:.3f} -> {after['exact']:.3f}; "
        f"with images swapped {after['exact_swapped']:.3f}\n{summary}"
    )
    assert before["exact"] <= likely(CHANCE, before["samples"])
    assert after["exact"] >= 0.9
    assert after["exact_swapped"] <= likely(CHANCE, after["samples_swapped"])
    assert "eval (images swapped)" in summary
    audit = run.audit()
    rollouts = sum(row["rollouts"] for row in run.rows("metrics.jsonl"))
    assert (audit["lost"], audit["duplicated"], audit["dead"], audit["trained"]) == (
        0,
        0,
        0,
        rollouts,
    )
    with open_run(
        load_settings(run.files, overrides=run.sets[1::2], environ={}), purpose="test"
    ) as bus:
        unacknowledged = {
            int(fields[b"n"])
            for _, fields in bus.connection.ask("XRANGE", bus.keys.streams["train"], "-", "+")
        }
        assert set(bus.images.holding_numbers()) == unacknowledged, (
            "images stay for what the last checkpoint alone has seen trained, and for nothing else"
        )
        assert bus.connection.ask("HLEN", bus.keys.images) <= len(unacknowledged) < rollouts / 10
