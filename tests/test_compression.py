"""`make compression`: the half student, what its models are measured by, and its two settings
files. That command alone fetches the model and trains.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.real import compression
from benchmarks.real.compression_curves import curve_of
from benchmarks.real.half import kept_layers, make_half
from benchmarks.real.measure import Measured, outside_text, perplexity, reverse_kl
from benchmarks.real.problems import HELD_OUT, TRAINED, write_problems, write_varied_problems
from onstream.pipeline.tasks import Problem
from onstream.settings.load import load_settings, resolve
from onstream.settings.rules import warnings_of
from onstream.workers.launcher.preflight import find_problems
from tests.test_real import stand_in

ROOT = Path(__file__).parents[1]
TEACHER = ROOT / "examples/reverse-text/teacher"
STUDENT = ROOT / "examples/reverse-text/student"


def test_half_of_the_layers_are_spread_over_all_of_them() -> None:
    assert kept_layers(30) == [0, 2, 4, 6, 8, 10, 12, 14, 17, 19, 21, 23, 25, 27, 29]
    assert kept_layers(4) == [0, 3]


def test_the_half_is_the_models_own_weights_and_loads_as_any_model(tmp_path: Path) -> None:
    make_half(TEACHER, tmp_path / "half")
    whole = AutoModelForCausalLM.from_pretrained(TEACHER)
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert (half.config.num_hidden_layers, len(half.model.layers)) == (2, 2)
    for kept, original in enumerate([0, 3]):
        theirs = whole.model.layers[original].state_dict()
        for name, weights in half.model.layers[kept].state_dict().items():
            assert torch.equal(weights, theirs[name]), name
    assert torch.equal(half.model.embed_tokens.weight, whole.model.embed_tokens.weight)
    assert half.lm_head.weight is half.model.embed_tokens.weight, "still tied"
    assert (tmp_path / "half" / "tokenizer.json").exists()


def test_a_model_that_finds_all_tokens_alike_has_the_perplexity_of_its_vocabulary() -> None:
    def blank(tokens: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=torch.zeros(*tokens.shape, 7))

    assert perplexity(blank, torch.arange(1000) % 7) == pytest.approx(7)


def test_the_reverse_kl_is_nothing_to_itself_and_something_to_another() -> None:
    tokenizer = AutoTokenizer.from_pretrained(STUDENT)
    student = AutoModelForCausalLM.from_pretrained(STUDENT, dtype=torch.float32)
    teacher = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32)
    problems = [Problem([{"role": "user", "content": "Reverse: stone"}])]
    with torch.inference_mode():
        assert reverse_kl(student, student, tokenizer, problems) == pytest.approx(0, abs=1e-6)
        assert reverse_kl(student, teacher, tokenizer, problems) > 0.1


def test_the_text_outside_the_domain_is_the_story_alone() -> None:
    text = outside_text()
    assert "the people of this twenty-ninth\ncentury live continually in fairyland" in text
    assert "GUTENBERG EBOOK" not in text
    assert "License" not in text


@pytest.mark.parametrize("file", [compression.HARD, compression.ON_POLICY], ids=lambda f: f.stem)
def test_the_settings_check_clean(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    tiny = stand_in(tmp_path)
    models = [setting for setting in tiny if setting.startswith("model.name=")]
    if file == compression.ON_POLICY:
        tiny += [f"teacher_inference.{setting}" for setting in models]
    resolved = resolve([file], overrides=tiny, environ={})
    assert [*resolved.problems, *find_problems(resolved, online=False)] == []
    assert resolved.settings is not None
    assert warnings_of(resolved.settings) == []


def test_the_held_out_problems_and_the_examples_are_those_of_make_real(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    files = ("examples/smollm2/onstream.toml", compression.HARD, compression.ON_POLICY)
    real, hard, on_policy = (load_settings([file], environ={}).task for file in files)
    assert real.eval_path == hard.eval_path
    assert real.teacher_prompt == hard.teacher_prompt
    assert hard == on_policy


def test_the_student_is_taught_with_many_names_and_with_none_that_is_held_out(
    tmp_path: Path,
) -> None:
    varied, held_out = tmp_path / "varied.jsonl", tmp_path / "held_out.jsonl"
    write_problems(tmp_path / "trained.jsonl", held_out)
    write_varied_problems(varied)
    trained, asked = (
        [json.loads(line)["answer"]["const"] for line in file.read_text().splitlines()]
        for file in (varied, held_out)
    )
    assert (len(trained), len(asked)) == (TRAINED, HELD_OUT)
    for key in ("name", "city"):
        known = {row[key] for row in trained}
        assert len(known) > 1000
        assert known.isdisjoint(row[key] for row in asked)


def test_what_is_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def onstream(command: str, file: str, *arguments: str) -> None:
        name = next((word[9:] for word in arguments if word.startswith("run.name=")), "hard")
        said.append(f"{command} {name}")

    def exported(run: Path, directory: Path) -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        return directory

    def measure(directory: Path, *given: object) -> Measured:
        said.append(f"measure {directory.parent.name}/{directory.name}")
        return Measured(80_000_000, 128, 256, 0.5, 20.0, ["{}"])

    @contextmanager
    def chat_server(*given: object) -> Iterator[str]:
        yield "http://127.0.0.1:1/v1"

    problems = tmp_path / "problems.jsonl", tmp_path / "held_out.jsonl"
    write_problems(*problems)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["compression"])
    monkeypatch.setenv("ONSTREAM_TASK__PATH", str(problems[0]))
    monkeypatch.setenv("ONSTREAM_TASK__EVAL_PATH", str(problems[1]))
    for double in (onstream, exported, measure, chat_server):
        monkeypatch.setattr(compression, double.__name__, double)
    for writer in ("write_problems", "write_varied_problems"):
        monkeypatch.setattr(compression, writer, lambda *files: None)
    monkeypatch.setattr(compression, "make_half", lambda whole, half: half.mkdir())
    for name in ("HALF", "TAUGHT", "RUNS"):
        monkeypatch.setattr(compression, name, tmp_path / name.lower())
    compression.main()
    ups = ["up hard", "up on-policy", "up sampled", "up lora"]
    assert said[:4] == ups
    assert len(said) == 4 + 7
    said.clear()
    compression.main()
    assert said == ups[1:], "`onstream up` itself knows that a run has ended"


def test_a_curve_is_evaluations_by_version_or_the_mean_of_the_last_steps(tmp_path: Path) -> None:
    evals, metrics = tmp_path / "evals.jsonl", tmp_path / "metrics.jsonl"
    rows = [{"version": 20, "exact": 0.5}, {"version": 0, "exact": 0.25}]
    evals.write_text("".join(json.dumps(row) + "\n" for row in rows))
    steps = [{"step": step, "reward": float(step)} for step in range(1, 8)]
    metrics.write_text("".join(json.dumps(row) + "\n" for row in steps))
    assert curve_of(evals, "exact") == [(0, 0.25), (20, 0.5)]
    assert [value for _, value in curve_of(metrics, "reward")] == [1, 1.5, 2, 2.5, 3, 4, 5]
    assert curve_of(tmp_path / "none.jsonl", "reward") == []
