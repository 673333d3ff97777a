"""A stand-in for a worker, as a real process: does what its arguments say, which the real ones
cannot be told to do.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path


def main() -> None:
    """`exit CODE [WORDS]`, `die` by SIGKILL, `wait` for SIGTERM, `ignore` it; FILE is made when the
    process is up.
    """
    action, *rest = sys.argv[1:]
    if action == "exit":
        print(" ".join(rest[1:]), file=sys.stderr)
        sys.exit(int(rest[0]))
    if action == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    signal.signal(signal.SIGTERM, signal.SIG_IGN if action == "ignore" else lambda *_: sys.exit(0))
    Path(rest[0]).write_text(str(os.getpid()))
    while True:
        time.sleep(60)


if __name__ == "__main__":
    main()
