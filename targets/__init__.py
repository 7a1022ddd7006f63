"""What attention can become (`attnedit.targets.attention`) and where the result runs (`attnedit.targets.runtime`)."""

if __name__ != "attnedit.targets":
    raise ImportError(
        f"this package is installed as attnedit.targets; write 'import attnedit.targets', not 'import {__name__}'"
    )
