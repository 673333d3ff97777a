"""Log lines of every process, as text for people or JSON for collectors.

Each names the run, the stage and the worker.
"""

from __future__ import annotations

import logging
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TextIO, cast

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from onstream.settings.sections.run import LogSettings

ERROR_CHARACTERS = 300
_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}


@dataclass(frozen=True)
class LoggedError:
    """An error in the log: its text, and when it was written, in seconds since the epoch."""

    text: str
    time: float


_last_error: LoggedError | None = None


def last_error() -> LoggedError | None:
    """The last line of level error or critical that this process wrote since `configure`."""
    return _last_error


def configure(
    stage: str, worker: str, run: str, log: LogSettings, *, stream: TextIO | None = None
) -> None:
    """Send this process's lines to `stream`, or to standard error.

    Each has `run`, `stage` and `worker`. A line about a rollout is given `number=`. Lines of
    libraries that log through the standard library take the same form, from level warning on.
    """
    out = cast(TextIO, LossyStream(stream or sys.stderr))
    processors: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        _Identity(run=run, stage=stage, worker=worker),
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _remember_error,
    ]
    renderers = _renderers(log, out)
    structlog.configure(
        processors=[*processors, *renderers],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[log.level]),
        logger_factory=structlog.PrintLoggerFactory(out),
    )
    handler = logging.StreamHandler(out)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*processors, structlog.stdlib.add_logger_name],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderers],
        )
    )
    logging.basicConfig(
        handlers=[handler], level=max(_LEVELS[log.level], logging.WARNING), force=True
    )
    logging.captureWarnings(True)


@contextmanager
def configured_apart() -> Iterator[None]:
    """Give the process its own logging back at the end, whatever `configure` does in between.

    For a process that is the user's, and not a worker.
    """
    structured = structlog.get_config() if structlog.is_configured() else None
    handlers = logging.root.handlers[:]
    level = logging.root.level
    captured = warnings.showwarning.__module__ == logging.__name__
    logging.root.handlers[:] = []  # `configure` would close those that it finds
    try:
        yield
    finally:
        logging.root.handlers[:] = handlers
        logging.root.setLevel(level)
        logging.captureWarnings(captured)
        structlog.reset_defaults()
        if structured is not None:
            structlog.configure(**structured)


def get_logger() -> structlog.typing.FilteringBoundLogger:
    """A logger whose lines `configure` shapes, also when it was made before."""
    logger: structlog.typing.FilteringBoundLogger = structlog.get_logger()
    return logger


def is_logged(before: int, now: int) -> bool:
    """Whether what has happened `now` times, and `before` times at the last look, is logged.

    It is at the 1st, 2nd, 4th, 8th … time: what always happens must not flood the log.

    >>> [count for count in range(1, 20) if is_logged(count - 1, count)]
    [1, 2, 4, 8, 16]
    """
    return before.bit_length() < now.bit_length()


class LossyStream:
    """A text stream that drops what it cannot write: a full disk must not end a process.

    That something was dropped is told in a line as soon as there is room.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._dropped = False

    def write(self, text: str) -> int:
        """Write `text` if that is possible."""
        try:
            if self._dropped:
                self._stream.write("(lines before this one could not be written)\n")
            self._stream.write(text)
            self._stream.flush()
            self._dropped = False
        except OSError:
            self._dropped = True
        return len(text)

    def flush(self) -> None:
        """Nothing: `write` does it."""

    def isatty(self) -> bool:
        """Whether people read it."""
        return self._stream.isatty()


class _Identity:
    """Adds who writes the line; no context variables, as threads do not inherit them."""

    def __init__(self, **identity: str) -> None:
        self._identity = identity

    def __call__(self, logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
        return {**self._identity, **event}


def _remember_error(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    """Keep the last error for the heartbeat: a worker's log may be on another machine."""
    global _last_error
    if event.get("level") in ("error", "critical"):
        cause = event.get("error") or event.get("reason")
        if not cause and event.get("exc_info"):
            cause = sys.exc_info()[1]
        text = f"{event.get('event')}: {cause}" if cause else str(event.get("event"))
        _last_error = LoggedError(text[:ERROR_CHARACTERS], time.time())
    return event


def _renderers(log: LogSettings, stream: TextIO) -> list[Processor]:
    as_console = log.format == "console" or (log.format == "auto" and stream.isatty())
    if as_console:
        # The plain traceback: the pretty one prints local variables, and with them what settings
        # hide.
        plain = structlog.dev.plain_traceback
        return [structlog.dev.ConsoleRenderer(colors=stream.isatty(), exception_formatter=plain)]
    return [
        structlog.processors.format_exc_info,
        structlog.processors.JSONRenderer(ensure_ascii=False),
    ]
