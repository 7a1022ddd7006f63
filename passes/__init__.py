"""Passes over attention sites, one file or folder each; the name of the folder is what it rewrites into."""

if __name__ != "attnedit.passes":
    raise ImportError(f"this package is installed as attnedit.passes; write 'import attnedit.passes', not {__name__!r}")
