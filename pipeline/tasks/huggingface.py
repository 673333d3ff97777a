"""The task `hf:<path>`: a data set of the Hugging Face hub, or a local directory or file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from onstream.pipeline.errors import UserError
from onstream.pipeline.tasks.base import FiniteTask, Problem
from onstream.pipeline.tasks.rows import RowError, RowReader
from onstream.settings.extras import missing_by_import
from onstream.settings.root import Settings

if TYPE_CHECKING:
    from datasets import Dataset

HUB_TIMEOUT_S = 5.0
FORMATS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}


class DatasetRows(Sequence[Problem]):
    """The problems of a data set, each read at its use: the data stays on disk."""

    def __init__(self, dataset: Dataset, reader: RowReader) -> None:
        self._dataset = dataset
        self._reader = reader

    def check(self, place: str) -> None:
        """Read every row once.

        Raises:
            UserError: a row holds no problem; the first such row is named, in `place`.
        """
        for number, row in enumerate(self._dataset):
            try:
                self._reader.problem(row)
            except RowError as error:
                raise error.at(f"{place} row {number}") from error

    def __len__(self) -> int:
        return len(self._dataset)

    @overload
    def __getitem__(self, index: int) -> Problem: ...
    @overload
    def __getitem__(self, index: slice) -> list[Problem]: ...
    def __getitem__(self, index: int | slice) -> Problem | list[Problem]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        return self._reader.problem(self._dataset[index])


def load_huggingface(settings: Settings) -> FiniteTask:
    """The task over the data set that `task.name` names after `hf:`.

    `task.args` go to `datasets.load_dataset`, except `eval_split`: the split that is held out in
    place of the last `eval.samples` rows. Of a local file this is the file `task.eval_path`.

    Raises:
        UserError: the data set cannot be loaded, a row holds no problem, or nothing is left to
            train on.
    """
    path = settings.task.name.removeprefix("hf:")
    split = settings.task.split
    samples = settings.eval.samples
    args = dict(settings.task.args)
    eval_split = args.pop("eval_split", None)
    reader = RowReader(settings)
    dataset = _load(path, split, args)
    rows = DatasetRows(dataset, reader)
    rows.check(f"{path} [{split}]")
    others = _held_out(settings, path, eval_split, args)
    if others is None:
        cut = max(0, len(rows) - samples)
        held_out = rows[cut:]
        rows = DatasetRows(dataset.select(range(cut)), reader)
    else:
        held_out_rows = DatasetRows(others, reader)
        held_out_rows.check(str(settings.task.eval_path or f"{path} [{eval_split}]"))
        held_out = held_out_rows[:samples]
    return FiniteTask(rows, held_out, name=path, seed=settings.run.seed)


def _held_out(
    settings: Settings, path: str, eval_split: str | None, args: dict[str, Any]
) -> Dataset | None:
    """The data that is held out, where it is apart from what is trained on."""
    eval_path = settings.task.eval_path
    is_file = Path(path).is_file()
    if (eval_path is not None and not is_file) or (eval_split is not None and is_file):
        raise UserError(
            f"hf:{path} with `task.eval_path` = {eval_path} and `eval_split` = {eval_split}",
            expected="`task.eval_path` for a local file, `task.args.eval_split` for a data set "
            "with splits",
            next_step="Leave the other one out.",
        )
    if eval_path is not None:
        return _load(str(eval_path), "train", args)
    return None if eval_split is None else _load(path, eval_split, args)


def _load(path: str, split: str, args: dict[str, Any]) -> Dataset:
    """A split, or a slice of it such as `train[:100]`. A local file has one split, of any name."""
    datasets = _library(path)
    datasets.disable_progress_bars()
    local = Path(path)
    kind = FORMATS.get(Path(path).suffix)
    away = False
    try:
        if local.is_file() and kind:
            files = {split.partition("[")[0]: str(local)}
            if kind == "csv":
                args = _all_text(datasets, local, args)
            return datasets.load_dataset(kind, data_files=files, split=split, **args)
        if (local / "state.json").is_file() or (local / "dataset_dict.json").is_file():
            return _saved(datasets.load_from_disk(path, **args), split)
        with _offline_where_hub_is_away(datasets, path) as away:
            return datasets.load_dataset(path, split=split, **args)
    except Exception as error:  # the library raises dozens of types, from several packages
        if away:
            why = "the hub is out of reach, and the data set is not in the local cache"
            raise _not_loaded(path, split, why) from error
        first_line = str(error).strip().partition("\n")[0]
        raise _not_loaded(path, split, f"{type(error).__name__}: {first_line}") from error


def _all_text(datasets: Any, file: Path, args: dict[str, Any]) -> dict[str, Any]:
    """`args` with which the columns of a CSV file are texts, and an empty field is missing.

    The library would guess types: an answer 007 would become 7, and a prompt `None` nothing.
    """
    import pandas

    columns = pandas.read_csv(file, nrows=0, **args).columns
    features = datasets.Features({name: datasets.Value("string") for name in columns})
    return {"features": features, "keep_default_na": False, "na_values": [""], **args}


@contextmanager
def _offline_where_hub_is_away(datasets: Any, path: str) -> Iterator[bool]:
    """Let `datasets` use its cache alone where the hub does not answer; yields whether that is so.

    The library itself would find out only after half a minute of retries.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    if Path(path).exists() or constants.HF_HUB_OFFLINE:
        yield False
        return
    try:
        HfApi().dataset_info(path, timeout=HUB_TIMEOUT_S)
        away = False
    except HfHubHTTPError:
        away = False  # it answers: the library says what is wrong
    except Exception:  # of whatever HTTP library the hub's client has
        away = True
    modules: tuple[Any, ...] = (constants, datasets.config) if away else ()
    for module in modules:
        module.HF_HUB_OFFLINE = True
    try:
        yield away
    finally:
        for module in modules:
            module.HF_HUB_OFFLINE = False


def _library(path: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        if missing := missing_by_import(error, f"task.name = hf:{path}"):
            raise missing from error
        raise
    return datasets


def _saved(saved: Any, split: str) -> Any:
    """The split in what `save_to_disk` wrote: a dictionary of splits, or one data set alone."""
    return saved[split] if isinstance(saved, dict) else saved


def _not_loaded(path: str, split: str, why: str) -> UserError:
    return UserError(
        f"`task.name` = hf:{path}, split {split!r}, cannot be used: {why}",
        expected="a data set of the hub, or a local directory or .parquet, .json, .jsonl or .csv "
        "file, with rows in that split",
        next_step="Correct `task.name`, `task.split` or `task.args` (a configuration of the data "
        "set goes to `task.args.name`).",
    )
