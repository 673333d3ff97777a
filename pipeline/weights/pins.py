"""Policy versions that must stay on disk: one empty file per version and use, in `pinned/`."""

from __future__ import annotations

from pathlib import Path

_FOLDER = "pinned"


def pin(run_dir: Path, version: int, use: str) -> bool:
    """Keep `version` for `use` until it is unpinned; False if it was pinned for that already."""
    path = _path(run_dir, version, use)
    path.parent.mkdir(exist_ok=True)
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def unpin(run_dir: Path, version: int, use: str) -> None:
    """Say that `use` no longer needs `version`."""
    _path(run_dir, version, use).unlink(missing_ok=True)


def pins(run_dir: Path) -> set[tuple[int, str]]:
    """Every pinned version, with its use."""
    names = [path.name.partition(".") for path in (run_dir / _FOLDER).glob("[0-9]*.*")]
    return {(int(version), use) for version, _, use in names}


def pinned(run_dir: Path) -> set[int]:
    """Every pinned version."""
    return {version for version, _ in pins(run_dir)}


def _path(run_dir: Path, version: int, use: str) -> Path:
    return run_dir / _FOLDER / f"{version:06d}.{use}"
