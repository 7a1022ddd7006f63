"""``python -m attnedit.cli``: the command ``attnedit``."""

import sys

from attnedit.cli import main

sys.exit(main())
