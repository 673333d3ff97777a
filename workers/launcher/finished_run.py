"""`onstream up` on a run that has finished: there is nothing to start, and it is said at once."""

from __future__ import annotations

from onstream.pipeline.errors import Exit, UserError
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.run_files.json_lines import read_rows
from onstream.settings.plan import Plan, differences
from onstream.settings.root import Settings
from onstream.workers.trainer.durability import checkpoint


def finished_step(settings: Settings, bus: Bus) -> int | None:
    """The step after which the run has finished, with nothing left to do; None where it has not.

    Something is left where more steps are asked for, a held-out evaluation is missing, or an
    operator has asked the trainer for something.
    """
    if not bus.state.finished():
        return None
    step = max(checkpoint.by_step(settings.run_dir / checkpoint.FOLDER), default=None)
    if step is None or step < settings.trainer.max_steps or not _evaluated(settings, step):
        return None
    return None if any(True for _ in bus.requests.waiting()) else step


def refuse_changes(ours: Plan, theirs: Plan, step: int) -> None:
    """Refuse settings that can have no effect any more, as the run has finished after `step`.

    Raises:
        UserError: some differ from those that the run was trained with.
    """
    if changed := differences(ours, theirs):
        raise UserError(
            f"run {theirs.run!r} is already finished at step {step}, and was trained with other "
            f"settings: {'; '.join(map(str, changed))}",
            expected="the settings that it was trained with, or more steps",
            next_step=f"Raise trainer.max_steps above {step}, or choose another run.name.",
            exit=Exit.REFUSED,
        )


def _evaluated(settings: Settings, step: int) -> bool:
    if not settings.eval.samples:
        return True
    evaluated = {row["version"] for row in read_rows(settings.run_dir / "evals.jsonl")}
    return {0, step} <= evaluated
