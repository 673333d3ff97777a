"""`python -m onstream`: the command `onstream`, for where it is not on the path."""

import os
import sys

# Python puts the working directory first, unless it is told -P: a `token.py` of the user's own that
# lies there would take the place of the standard library's.
if not sys.flags.safe_path and sys.path[0] == os.getcwd():
    del sys.path[0]

from onstream.workers.commands.cli import main

main()
