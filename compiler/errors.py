"""Everything attnedit raises on purpose.

A message is one line: what is wrong, where, and what to do. The command line prints it as it stands and
exits with the class's ``exit_code``; library users catch `AttneditError`.
"""

from __future__ import annotations


class AttneditError(Exception):
    r"""The job failed: it diverged, ran out of something, or broke its own promise.

    Whatever text is given is folded into one line, since messages of other libraries that are quoted in it
    often span several.

    >>> str(AttneditError("layer 3 diverged\n  at step 10; lower the learning rate"))
    'layer 3 diverged at step 10; lower the learning rate'
    """

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class VerificationError(AttneditError):
    """A rewrite broke the contract it declares, measured on real numbers."""


class RewriteError(AttneditError):
    """A rewrite is written wrongly; addressed to its author: what, where, expected and got, what to do."""


class UsageError(AttneditError):
    """Wrong usage or bad input: the user can mend it."""

    exit_code = 2


class CaptureError(UsageError):
    """The model's attention cannot be captured, or a fact cannot be read off its graph."""


class OtherAttentionError(CaptureError):
    """Attention of a kind that is not converted; it stays as it is beside attention that is."""


def first_line(error: BaseException) -> str:
    r"""What an error of another library says, short enough to be quoted in a message of ours.

    Args:
        error: that was caught.

    Returns:
        The first line of its text that is not blank; the name of its class where there is none.

    >>> first_line(ValueError("\n no such dtype\nargs = (...)")), first_line(AssertionError())
    ('no such dtype', 'AssertionError')
    """
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
