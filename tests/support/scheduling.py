"""Which tests run in one process: those that share what is slow to make."""

from __future__ import annotations

import re

from families import FAMILIES
from xdist.scheduler import LoadScopeScheduling


class BySubject(LoadScopeScheduling):
    """Gives one worker all tests of a family, and all others of a file.

    What a process has captured or compiled it does not make again. By the tests' names, which every pytest has; what
    pytest-xdist 3.8 makes of its `xdist_group` mark never reaches the scheduler under pytest 9.2.
    """

    def _split_scope(self, nodeid: str) -> str:
        return subject_of(nodeid)


def subject_of(nodeid: str) -> str:
    """The first family that a test's parameters name, else its file."""
    file, _, rest = nodeid.partition("::")
    parameters = re.split(r"[\[\]\s-]", rest.partition("[")[2])
    return next((word for word in parameters if word in FAMILIES), file)
