"""``python -m attnedit.cli``: the command ``attnedit``."""

import sys

from attnedit.cli import main

if __name__ == "__main__":
    sys.exit(main())
