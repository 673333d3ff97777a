"""The ledger."""

from pathlib import Path

import pytest

from onstream.pipeline.run_files.ledger import Ledger, Settled


def test_the_ledger_gives_back_its_lines_in_order(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "trained.jsonl")
    assert list(ledger.read()) == []
    ledger.append([Settled(2, "trained", 1), Settled(1, "dead", 1)])
    size = ledger.append([Settled(3, "stale", 2)])
    assert list(ledger.read()) == [
        Settled(2, "trained", 1),
        Settled(1, "dead", 1),
        Settled(3, "stale", 2),
    ]
    assert (tmp_path / "trained.jsonl").stat().st_size == size
    assert (tmp_path / "trained.jsonl").read_text().splitlines()[
        0
    ] == '{"number":2,"fate":"trained","step":1}'


def test_a_ledger_is_cut_back_to_what_a_checkpoint_remembers(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "trained.jsonl")
    size = ledger.append([Settled(1, "trained", 1)])
    ledger.append([Settled(2, "trained", 2)])
    assert ledger.cut(size) == 0
    assert list(ledger.read()) == [Settled(1, "trained", 1)]


def test_a_ledger_shorter_than_its_checkpoint_says_by_how_much(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "trained.jsonl")
    size = ledger.append([Settled(1, "trained", 1)])
    assert ledger.cut(size + 11) == 11
    assert Ledger(tmp_path / "none.jsonl").cut(5) == 5


def test_a_line_still_being_written_is_left_out(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "trained.jsonl")
    ledger.append([Settled(1, "trained", 1)])
    with ledger.path.open("ab") as file:
        file.write(b'{"number":2,"fa')
    assert list(ledger.read()) == [Settled(1, "trained", 1)]


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "trained.jsonl"
    path.write_text(
        '{"number":1,"fate":"trained","step":1}\n{"number":2,"fate":"eaten","step":1}\n'
    )
    with pytest.raises(ValueError, match=r"trained\.jsonl, line 2: .*eaten"):
        list(Ledger(path).read())
