"""The named scorers in scorer processes: what hangs, eats memory or breaks them costs itself."""

from __future__ import annotations

from onstream.settings.root import Settings
from onstream.workers.verifier.scorer_messages import Verdict
from onstream.workers.verifier.scorer_pool import TIMED_OUT, ScorerPool
from tests.waiting import LONGEST_S

RIGHT = Verdict(1.0, {"answered": 1.0})
WRONG = Verdict(0.0, {"answered": 1.0})


def verdicts(
    scorer: str, answer: str, completions: list[str], *, timeout_s: float
) -> list[Verdict]:
    """The verdicts of one scorer process, in the order of `completions`."""
    verification = {"timeout": timeout_s, "processes": 1, "max_memory": 512}
    pool = ScorerPool(
        Settings.model_validate(
            {"task": {"scorer": scorer}, "orchestrator": {"verification": verification}}
        )
    )
    pool.start()
    try:
        for key, completion in enumerate(completions):
            pool.score(key, [], completion, {"answer": answer})
        got: dict[int, Verdict] = {}
        while pool.in_hand:
            got.update(pool.collect(LONGEST_S))
    finally:
        pool.close()
    return [got[key] for key in range(len(completions))]


def test_math_that_nobody_can_compute_scores_zero_and_the_next_answer_is_scored() -> None:
    right = r"\boxed{72}"
    nested = r"\boxed{" + "(" * 2_000 + "72" + ")" * 2_000 + "}"
    scored = verdicts("math", "72", [right, "9**9**9", nested, right], timeout_s=5)
    assert [verdict.reward for verdict in scored] == [1.0, 0.0, 0.0, 1.0]
    assert TIMED_OUT in scored


def test_a_pattern_that_never_ends_scores_zero_and_the_next_answer_is_scored() -> None:
    slow = "a" * 40 + "!"
    assert verdicts("regex", r"(a+)+", ["aa", slow, "aa"], timeout_s=2) == [
        Verdict(1.0),
        TIMED_OUT,
        Verdict(1.0),
    ]


def test_deep_json_is_wrong_in_a_scorer_process_too() -> None:
    tree = '{"type": "array", "items": {"$ref": "#"}}'
    deep = "[" * 900 + "1" + "]" * 900
    assert verdicts("json-schema", tree, ["[[]]", deep, "[[]]"], timeout_s=20) == [
        RIGHT,
        WRONG,
        RIGHT,
    ]
