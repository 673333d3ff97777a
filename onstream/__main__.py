"""`python -m onstream`: the command `onstream`, for where it is not on the path."""

from onstream.workers.commands.cli import main

main()
