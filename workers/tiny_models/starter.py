"""What `onstream init` writes: settings, problems, a scorer, and a student to try them on."""

from __future__ import annotations

import json
import re
from pathlib import Path

from onstream.pipeline.errors import UserError

WORDS = """
stream record window garden letter silver market bottle castle winter forest
orange planet summer travel candle bridge island mirror pocket rocket saddle
tunnel velvet wisdom yellow anchor basket copper desert engine flower
"""

SETTINGS = """\
# A run of Onstream. Start it in this directory, which paths lead from:
#
#     onstream check onstream.toml   # what it would do, and everything that is wrong with it
#     onstream up onstream.toml      # do it; Ctrl-C stops without loss, the same command resumes
#
# `onstream check --all onstream.toml` shows every setting; docs/settings.md explains them.

[run]
name = "{name}"                # its files go to runs/{name}/

[model]
# The student. This one was made here with random weights, so that all this runs at once, offline
# and on any machine. It learns next to nothing. For real work name an instruction-tuned model of
# the Hugging Face hub, such as "Qwen/Qwen3-0.6B", or a directory that holds one.
name = "models/student"

[task]
name = "jsonl"
path = "problems.jsonl"        # one problem a line
scorer = "scorer:score"        # in scorer.py; left out, exactly the right answer scores 1

[eval]
samples = 8                    # the last lines are held out, and answered before and after training

[inference.sampling]
max_completion = 16            # tokens of an answer; a real model needs hundreds

[orchestrator]
batch_size = 32                # answers that a step trains on: 4 problems, each answered 8 times
group_size = 8

[trainer]
max_steps = 5

[trainer.optim]
lr = 1e-3                      # for a real model 1e-6 to 1e-5

[trainer.loss]
adv_tau = 1.0                  # the weight of the scorer's rewards
teacher_tau = 0.0              # that of a teacher, which judges every token; 0: none

# A teacher beside the run, with teacher_tau = 0.5 above (docs/modes.md has a file for each mode):
#
# [deployment]
# num_teacher_gpus = 1
#
# [teacher_inference.model]
# name = "Qwen/Qwen3-4B"
"""

SCORER = '''\
"""The score of an answer. Every verifier imports this file and calls `score`."""

from __future__ import annotations

from onstream.pipeline.tasks import RolloutError


def score(completion: str, info: dict) -> dict[str, float]:
    """Named parts of the reward, which is their sum.

    `completion` is what the student wrote. `info` has the other keys of the problem's line.
    """
    if len(completion) > 10_000:
        raise RolloutError("too long")  # the rollout is at fault: it scores 0
    answer = info["answer"]
    letters = sum(letter in completion for letter in answer) / len(answer)
    return {"right": float(completion.strip() == answer), "letters": 0.2 * letters}
'''

GITIGNORE = "runs/\nmodels/\n"


def write_starter(directory: Path) -> list[Path]:
    """Write the files of a first run into `directory`; returns them.

    Raises:
        UserError: one of them is there already.
    """
    files = {
        "onstream.toml": SETTINGS.format(name=_run_name(directory)),
        "problems.jsonl": "".join(f"{json.dumps(problem)}\n" for problem in _problems()),
        "scorer.py": SCORER,
        ".gitignore": GITIGNORE,
    }
    student = directory / "models" / "student"
    there = [path for path in (*(directory / name for name in files), student) if path.exists()]
    if there:
        raise UserError(
            f"{there[0]} exists",
            expected="a directory without a run's files",
            next_step="Choose another DIR, or remove it.",
        )
    from onstream.workers.tiny_models.fresh import ModelShape, write_fresh  # brings torch

    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name).write_text(text, encoding="utf-8")
    write_fresh(student, ModelShape(hidden=64, layers=2, intermediate=128), seed=0)
    return [*(directory / name for name in files), student]


def _run_name(directory: Path) -> str:
    """The directory's name as the name of a run."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", directory.resolve().name).strip("._-")
    return name[:64] or "first"


def _problems() -> list[dict[str, str]]:
    return [{"prompt": f"Reverse: {word}", "answer": word[::-1]} for word in WORDS.split()]
