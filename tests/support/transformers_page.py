"""Outcomes of transformers' checks: where they are kept, and the tables of docs/transformers-checks.md made of them.

python tests/support/transformers_page.py               # all families, anew
python tests/support/transformers_page.py llama gpt_oss # these
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from transformers_checks import CHECKS, FAMILIES, NONE, PASSES, TARGETS, checks_of, outcome, subject

DOCS = Path(__file__).resolve().parents[2] / "docs"
OUTCOMES = DOCS / "data" / "transformers-checks.json"
PAGE = DOCS / "transformers-checks.md"
BEGIN, END = "<!-- made by tests/support/transformers_page.py -->", "<!-- end -->"
TITLES = {
    "Building, saving and loading (`tests/test_modeling_common.py`)": ("transformers_loading", "transformers_classes"),
    "Outputs, training and attention (`tests/test_modeling_common.py`)": ("transformers_modelling",),
    "Generation (`tests/generation/test_utils.py`)": ("transformers_generation", "transformers_continuing"),
}
SUBJECTS = ("source", *TARGETS)
RUN = {name: [family for family in FAMILIES if name in checks_of(family)] for name in CHECKS}

Outcomes = dict[str, dict[str, dict[str, str]]]
"""By family, check and subject."""


def recorded() -> Outcomes:
    """What was found when the page was made."""
    result: Outcomes = json.loads(OUTCOMES.read_text(encoding="utf-8"))
    return result


def tables(found: Outcomes) -> str:
    """Markdown: a table for each title."""
    lines = [BEGIN]
    for title, modules in TITLES.items():
        lines += ["", f"### {title}", "", "| check | source | MLA | GateSWA |", "|---|---|---|---|"]
        for name, function in CHECKS.items():
            if function.__module__.rpartition(".")[2] in modules:
                cells = [_cell({family: found[family][name][kind] for family in RUN[name]}) for kind in SUBJECTS]
                lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join([*lines, "", END])


def _cell(by_family: dict[str, str]) -> str:
    """One outcome where it is the same for all families, else the families of each."""
    kinds = {kind: [family for family, other in by_family.items() if other == kind] for kind in by_family.values()}
    if len(kinds) == 1:
        return "–" if NONE in kinds else next(iter(kinds))
    shown = [(kind, names) for kind, names in kinds.items() if kind != NONE]
    if len(shown) == 1:
        return f"{shown[0][0]} ({', '.join(shown[0][1])})"
    return "; ".join(f"{kind}: {', '.join(names)}" for kind, names in shown)


def with_tables(page: str, found: Outcomes) -> str:
    """The page with tables of what was found."""
    before, rest = page.split(BEGIN)
    return before + tables(found) + rest.split(END)[1]


def worse(found: Outcomes) -> list[str]:
    """Checks that pass for the source and fail for what was made of it."""
    return [
        f"{family}: {name}: {kind}"
        for family, checks in found.items()
        for name, by_subject in checks.items()
        for kind in TARGETS
        if by_subject["source"] == PASSES and by_subject[kind] not in (PASSES, NONE)
    ]


def main(families: list[str]) -> int:
    """Run the checks of some families, and write what was found."""
    found = recorded() if OUTCOMES.exists() else {}
    for family in families or FAMILIES:
        checks: dict[str, dict[str, str]] = {}
        for name in checks_of(family):
            checks[name] = {}
            for kind in SUBJECTS:
                checks[name][kind], reason = outcome(name, subject(family, kind))
                if reason:
                    print(f"{family} {kind} {name} {checks[name][kind]}: {reason}", flush=True)
        found[family] = checks
        subject.cache_clear()
        OUTCOMES.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if found.keys() == FAMILIES.keys():
        PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8"), found), encoding="utf-8")
    for line in worse(found):
        print("worse than the source:", line)
    return int(bool(worse(found)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
