"""``python -m attnedit``: the command line, for a Python whose scripts are not on the path."""

import sys

from attnedit.cli import main

if __name__ == "__main__":
    sys.exit(main())
