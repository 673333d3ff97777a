"""The example of docs/environments.md, played."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from onstream.pipeline.environments import Started, load_environment
from onstream.pipeline.tasks import Problem
from onstream.settings.root import Settings

PAGE = Path(__file__).parents[3] / "docs" / "environments.md"


@pytest.fixture
def riddle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The environment of the page, loaded as a worker does."""
    [source] = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    (tmp_path / "my_game.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    return load_environment(Settings.model_validate({"task": {"environment": "my_game:Riddle"}}))


def test_the_pages_environment_answers_calls_and_scores_guesses(riddle: Any) -> None:
    def step(state: Any, content: str) -> Any:
        return riddle.step(state, {"role": "assistant", "content": content})

    started = riddle.start(Problem([{"role": "user", "content": "?"}], {"answer": "sea"}), 1)
    assert isinstance(started, Started)
    call = '<tool_call>{"name": "look_up", "arguments": {"word": "sea"}}</tool_call>'
    looked = step(started.state, call)
    assert looked.messages == [{"role": "tool", "content": "much water"}]
    wrong = step(looked.state, "sun")
    assert (wrong.messages[0]["content"], wrong.done) == ("No. Again?", False)
    right = step(wrong.state, "sea")
    assert (right.done, right.reward) == (True, {"right": 1.0, "quick": 0.5})
    assert step({"answer": "sea", "guesses": 2}, "sun").done
