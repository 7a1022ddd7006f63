"""Ctrl-C in the seconds that the command takes to import its libraries: code 130 and one line, no traceback."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any


def quiet_while_importing() -> None:
    """Let an interrupt end the process at once, where it is the command ``attnedit`` that is being imported.

    `as_usual` takes that back. Nothing is written by then.

    Raises:
        ValueError: in another thread than the main one.
    """
    command = Path(sys.argv[0]).stem == "attnedit" if sys.argv else False
    command = command or "attnedit.cli" in getattr(sys, "orig_argv", ())
    if command and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def as_usual() -> None:
    """From here on an interrupt is an exception."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(*_: Any) -> None:
    os.write(2, b"attnedit: interrupted\n")
    os._exit(130)
