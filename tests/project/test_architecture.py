"""What docs/architecture.md says of the way through the source is so."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import attnedit
from attnedit.testing import tiny_model, tokens

ROOT = Path(__file__).resolve().parents[2]
MOST = 17


def listed() -> list[str]:
    """Files of the path of one site, in order."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = page.split("## The path of one site\n")[1].split("\n## ")[0]
    return re.findall(r"^\d+\. `([\w/]+\.py)`", section, re.MULTILINE)


def test_the_path_of_a_site_goes_through_the_listed_files_in_order() -> None:
    entered: dict[str, None] = {}

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_name != "<module>":
            entered.setdefault(frame.f_code.co_filename)

    model, data = tiny_model(), tokens(6, 32)
    before = sys.getprofile()
    sys.setprofile(note)
    try:
        result = attnedit.compile(model, "mla", calibration=data, capture_cache=False)
        result.model.generate(tokens(1, 4), max_new_tokens=2)
    finally:
        sys.setprofile(before)
    path = listed()
    assert len(path) <= MOST
    files = [Path(name).resolve() for name in entered]
    assert [found for file in files if (found := file.as_posix().removeprefix(f"{ROOT.as_posix()}/")) in path] == path
