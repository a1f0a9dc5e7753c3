"""`python -m keel` is `keel`."""

import os
import sys

if not sys.flags.safe_path and sys.path[0] in ("", os.getcwd()):  # noqa: PTH109 (pathlib would be looked for there)
    # Python puts the current directory first. Commands that need plug-ins do that themselves; those that only read a
    # run must not find code of a stranger's there.
    del sys.path[0]

from keel.cli import main

if __name__ == "__main__":
    main()
