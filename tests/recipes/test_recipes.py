"""The recipes: each checks clean for an H100, and takes its first steps with tiny models and rows.

The hub is a stand-in with the shapes of the models; no network is asked.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
from huggingface_hub import constants
from rich.console import Console

from onstream.settings import devices
from onstream.settings.check import Findings, report
from onstream.settings.load import load_settings, resolve
from onstream.settings.rules import warnings_of
from onstream.workers.launcher import preflight, trainer_memory
from onstream.workers.launcher.model_warnings import model_warnings
from onstream.workers.launcher.preflight import find_problems
from onstream.workers.launcher.run_cost import cost_rows
from onstream.workers.launcher.trainer_memory import memory_rows
from onstream.workers.tiny_models.fresh import ModelShape, write_fresh
from tests.recipes.hub import fill_cache

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path.parent.name for path in ROOT.glob("recipes/*/onstream.toml"))
H100_BYTES = 81_559 << 20
ROWS = 10
TINY = ModelShape(hidden=32, layers=1, intermediate=32, context=4096)
LONGEST_S = 600  # of one `onstream up`, where it would hang


def file_of(recipe: str) -> Path:
    return ROOT / "recipes" / recipe / "onstream.toml"


def ten_rows(directory: Path, recipe: str) -> list[str]:
    """Settings by which the recipe's task reads ten rows of the same columns."""
    task = load_settings([file_of(recipe)], environ={}).task
    rows = [
        {task.prompt_field: f"{number} + {number}?", task.answer_field: f"#### {2 * number}"}
        for number in range(ROWS)
    ]
    path = directory / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    if task.name == "jsonl":
        return [f"task.path={path}", "eval.samples=2"]
    unset = [f"task.args.{name}=null" for name in task.args]
    return [f"task.name=hf:{path}", *unset, "eval.samples=2"]


@pytest.fixture
def h100_and_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with an H100, and the small files of the recipes' models in the hub's cache."""
    monkeypatch.chdir(ROOT)
    fill_cache(tmp_path / "hub")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for module in (devices, preflight):
        monkeypatch.setattr(module, "gpus_found", lambda: ["0"])
    monkeypatch.setattr(trainer_memory, "smallest_gpu_bytes", lambda: H100_BYTES)


@pytest.mark.usefixtures("h100_and_hub")
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_checks_clean_for_an_h100_and_says_its_memory_and_cost(
    recipe: str, tmp_path: Path
) -> None:
    resolved = resolve([file_of(recipe)], overrides=ten_rows(tmp_path, recipe), environ={})
    assert [*resolved.problems, *find_problems(resolved, online=False)] == []
    assert resolved.settings is not None
    assert [*warnings_of(resolved.settings), *model_warnings(resolved.settings)] == []
    memory = memory_rows(resolved.settings)
    cost = cost_rows(resolved.settings)
    assert "of its GPU" in memory["together"]
    assert float(cost["a step"].split()[0]) > 0
    out = StringIO()
    here = Findings(memory=memory, cost=cost)
    report(resolved, here, Console(file=out, width=200), everything=False)
    assert "Time on one H100, completions at their longest" in out.getvalue()
    assert f"a step   {cost['a step']}" in out.getvalue()


@pytest.mark.usefixtures("h100_and_hub")
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_page_says_who_has_run_it_and_what_it_costs(recipe: str, tmp_path: Path) -> None:
    page = (file_of(recipe).parent / "README.md").read_text()
    index = (ROOT / "recipes" / "README.md").read_text()
    _, first, *_ = filter(None, page.splitlines())
    assert first.startswith("**Nobody has run this recipe at full size.**")
    assert re.search(r"\]\(https://", page), "the source of the numbers"
    settings = load_settings([file_of(recipe)], overrides=ten_rows(tmp_path, recipe), environ={})
    amount, unit = cost_rows(settings)["the run"].split()[:2]
    [told] = re.findall(r"steps take ([\d.]+ \w+) on one H100", page)
    seconds = {"seconds": 1, "minutes": 60, "min": 60, "hours": 3600, "h": 3600}
    number, word = told.split()
    exact = float(amount) * seconds[unit]
    assert float(number) * seconds[word] == pytest.approx(exact, rel=0.25)
    assert f"| {told} |" in next(line for line in index.splitlines() if f"[{recipe}]" in line)


@pytest.mark.slow
@pytest.mark.timeout(LONGEST_S)
@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(
            recipe,
            marks=pytest.mark.rotates("recipes and self-distillation", place, len(RECIPES) + 1),
        )
        for place, recipe in enumerate(RECIPES)
    ],
)
def test_a_recipe_takes_its_first_steps_with_tiny_models(recipe: str, tmp_path: Path) -> None:
    tiny = write_fresh(tmp_path / "tiny", TINY, seed=0)
    settings = load_settings([file_of(recipe)], environ={})
    sets = [
        *ten_rows(tmp_path, recipe),
        f"run.dir={tmp_path}",
        f"model.name={tiny}",
        "deployment.device=cpu",
        "inference.sampling.max_completion=8",
        "orchestrator.batch_size=8",
        "orchestrator.group_size=4",
        "trainer.max_steps=2",
        "eval.samples=0",
        "eval.interval=0",
    ]
    if settings.teacher_inference.model.name:
        sets.append(f"teacher_inference.model.name={write_fresh(tmp_path / 'teacher', TINY, 1)}")
    options = [word for value in sets for word in ("--set", value)]
    done = subprocess.run(
        [sys.executable, "-m", "onstream", "up", str(file_of(recipe)), *options],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=LONGEST_S,
    )
    assert done.returncode in (0, 1), f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    report = json.loads((tmp_path / settings.run.name / "report.json").read_text())
    assert report["steps"] == 2
    steps = (tmp_path / settings.run.name / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line)["teacher_kl"] is not None for line in steps)
