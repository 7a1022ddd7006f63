"""The machine: captures graphs, finds attention sites, rewrites and verifies them; knows no particular attention."""

if __name__ != "attnedit.compiler":
    raise ImportError(f"this package is installed as 'attnedit.compiler'; import that, not {__name__!r}")
