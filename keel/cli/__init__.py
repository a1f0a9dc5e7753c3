"""The command line: `keel.cli.program` is the program, and beside it stands a module for each larger command.

Nothing here imports torch until a command needs it.
"""

from keel.cli.program import app, main

__all__ = ["app", "main"]
