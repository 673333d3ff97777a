"""Policy versions that must stay on disk for somebody: one empty file for each version and each use
of it, in `pinned/` of the run.
"""

from __future__ import annotations

from pathlib import Path

_FOLDER = "pinned"


def pin(run_dir: Path, version: int, use: str) -> bool:
    """Keep `version` for `use`, until unpinned; False if it was kept for that already."""
    path = _path(run_dir, version, use)
    path.parent.mkdir(exist_ok=True)
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def unpin(run_dir: Path, version: int, use: str) -> None:
    """`use` needs `version` no more."""
    _path(run_dir, version, use).unlink(missing_ok=True)


def pins(run_dir: Path) -> set[tuple[int, str]]:
    """Every version that is kept, with its use."""
    names = [path.name.partition(".") for path in (run_dir / _FOLDER).glob("[0-9]*.*")]
    return {(int(version), use) for version, _, use in names}


def pinned(run_dir: Path) -> set[int]:
    """Every version that is kept."""
    return {version for version, _ in pins(run_dir)}


def _path(run_dir: Path, version: int, use: str) -> Path:
    return run_dir / _FOLDER / f"{version:06d}.{use}"
