"""A run from Python: what its files and its Redis say of it, as data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from onstream.pipeline.errors import UserError
from onstream.pipeline.run_files.json_lines import read_rows
from onstream.settings.load import load_settings
from onstream.settings.root import Settings
from onstream.workers.evaluation.versions import kept_versions
from onstream.workers.inspection import audit as rollouts
from onstream.workers.inspection.dead_letters import dead_by_reason
from onstream.workers.inspection.run_phase import read_run_files
from onstream.workers.inspection.status import status, status_of_files
from onstream.workers.launcher import report
from onstream.workers.launcher.open_run import open_run

if TYPE_CHECKING:
    import pandas


class Rows(list[dict[str, Any]]):
    """The lines of a file of a run, a dictionary each."""

    def frame(self) -> pandas.DataFrame:
        """The rows as a frame of pandas, a column for each field.

        Raises:
            UserError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise UserError(
                "a frame where pandas is not installed",
                expected="pandas, which Onstream itself does without",
                next_step="Run `pip install pandas`, or take the rows as they are.",
            ) from error
        return pandas.DataFrame(self)


class Run:
    """A run that was started before, by its directory, its name or its settings.

    Everything is read anew at each call, while the run trains and after it has ended. Nothing of
    the run is changed; where it stands still, `status`, `audit` and `dead_letters` start its own
    Redis on its data and stop it again.
    """

    def __init__(self, run: Path | str | Settings) -> None:
        """Find a run: `"runs/reverse-text"`, or `"reverse-text"` for one under `runs/`.

        Raises:
            UserError: there is no such run, or its settings cannot be read.
        """
        self.settings = run if isinstance(run, Settings) else load_settings([run])

    def __repr__(self) -> str:
        return f"Run({str(self.directory)!r})"

    @property
    def name(self) -> str:
        """The name of the run."""
        return self.settings.run.name

    @property
    def directory(self) -> Path:
        """Where the run keeps its files."""
        return self.settings.run_dir

    def metrics(self) -> Rows:
        """A row for each step (`metrics.jsonl`; docs/metrics.md has the fields)."""
        return self._rows("metrics.jsonl")

    def evaluations(self) -> Rows:
        """A row for each evaluation on the held-out prompts (`evals.jsonl`)."""
        return self._rows("evals.jsonl")

    def samples(self) -> Rows:
        """Some rollouts of every `trainer.sample_interval` steps, to read (`samples.jsonl`)."""
        return self._rows("samples.jsonl")

    def _rows(self, name: str) -> Rows:
        return Rows(read_rows(self.directory / name))

    def report(self) -> dict[str, Any]:
        """What the run has come to so far, in the fields of `report.json`."""
        return report.of_files(self.directory)

    def policies(self) -> dict[int, Path]:
        """The directories of the policy versions that the run keeps, by version.

        Each loads with `from_pretrained`; those of a LoRA run may be adapters.
        """
        return dict(sorted(kept_versions(self.directory).items()))

    def status(self) -> dict[str, Any]:
        """What the run does and waits for, as `onstream status --json` prints it.

        Where its Redis cannot be asked, it is what the files tell, and `redis` says why.

        Raises:
            UserError: neither Redis nor files know the run.
        """
        files = read_run_files(self.directory)
        try:
            with open_run(self.settings, purpose="status") as bus:
                return status(bus, files)
        except UserError as error:
            if files.plan is None:
                raise
            return status_of_files(files, error.got)

    def audit(self, *, uids: bool = False) -> dict[str, Any]:
        """How many rollouts were issued, and how many of them came to which end.

        With `uids` the rollouts themselves, as `run/17`. `lost` and `duplicated` should be empty.

        Raises:
            UserError: the run's Redis cannot be asked.
        """
        with open_run(self.settings, purpose="audit") as bus:
            found = rollouts.audit(self.directory, bus)
        return found if uids else rollouts.counted(found)

    def dead_letters(self) -> dict[str, Any]:
        """The rollouts that were given up, by stage and reason, as `onstream dead list --json`.

        Raises:
            UserError: the run's Redis cannot be asked.
        """
        with open_run(self.settings, purpose="dead") as bus:
            return dead_by_reason(bus, self.directory)
