"""An evaluation plays whole episodes, whatever the environment does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from onstream.pipeline.errors import UserError
from onstream.settings.root import Settings
from onstream.workers.evaluation.greedy import evaluate

STUDENT = Path(__file__).parents[3] / "examples/reverse-text/student"
MAX_TURNS = 2


def evaluated(tmp_path: Path, *rows: dict[str, Any]) -> dict[str, Any]:
    """The evaluation on problems with these `info`, the last lines of a file."""
    every = {"answer": "", "turns": 1, "heard": str(tmp_path / "heard")}
    asked = ({"prompt": "Reverse: other"}, *rows)
    lines = [json.dumps({"prompt": "Reverse: stream", **every, **row}) for row in asked]
    problems = tmp_path / "problems.jsonl"
    problems.write_text("\n".join(lines))
    settings = Settings.model_validate(
        {
            "task": {
                "name": "jsonl",
                "path": problems,
                "environment": "tests.workers.evaluation.questions:Questions",
                "max_turns": MAX_TURNS,
            },
            "eval": {"samples": len(rows)},
            "deployment": {"device": "cpu"},
            "inference": {"sampling": {"max_completion": 16}},
            "orchestrator": {"verification": {"timeout": 0.5}},
        }
    )
    return evaluate(STUDENT, settings)


def test_every_episode_is_played_to_its_end_or_a_bound(tmp_path: Path) -> None:
    result = evaluated(tmp_path, {"turns": 1}, {"turns": 2}, {"turns": 4})
    assert result.pop("seconds") > 0
    assert result == {
        "exact": 2 / 3,
        "reward": pytest.approx((1 + 1 + 2 / 4) / 3),
        "samples": 3,
        "unscored": 0,
        "turns": (1 + 2 + 2) / 3,
        "tool_calls": (0 + 1 + 1) / 3,
    }


def test_each_turn_is_the_likeliest_one_after_all_that_came_before(tmp_path: Path) -> None:
    evaluated(tmp_path, {"turns": 2})
    model = AutoModelForCausalLM.from_pretrained(STUDENT)
    tokenizer = AutoTokenizer.from_pretrained(STUDENT)
    chat = [{"role": "user", "content": "Reverse: stream"}]
    for question in ("Reverse: more", ""):
        prompt = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ids = model.generate(**prompt, do_sample=False, max_new_tokens=16)
        text = tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        chat += [{"role": "assistant", "content": text}, {"role": "tool", "content": question}]
    heard = [json.loads(line) for line in (tmp_path / "heard").read_text().splitlines()]
    assert heard == [chat[1]["content"], chat[3]["content"]]


def test_what_an_environment_does_wrong_costs_its_own_episode_alone(tmp_path: Path) -> None:
    faults = [{"start": "raise"}, {"start": "die"}, {"step": "raise"}, {"step": "exit"}]
    stopped = [{"step": "hang"}, {"step": "die"}, {"step": "rollout error"}]
    result = evaluated(tmp_path, *faults, *stopped, {})
    assert (result["exact"], result["reward"]) == (1 / 8, 1 / 4)
    assert (result["samples"], result["unscored"]) == (8, 4)


def test_a_problem_without_room_for_a_turn_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"held-out problem 1: no room for a first turn: context"):
        evaluated(tmp_path, {}, {"prompt": "x" * 600})
