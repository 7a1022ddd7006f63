"""No check of transformers' own suites passes for a source and fails for its result; the page says what was found."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel
from transformers_checks import (
    CHECKS,
    FAILS,
    FAMILIES,
    PASSES,
    SLOW,
    TARGETS,
    DoesNotApply,
    Subject,
    checks_of,
    outcome,
    subject,
)
from transformers_page import PAGE, SUBJECTS, recorded, tables, worse

FAST = "llama"


def marks(family: str, name: str) -> list[pytest.MarkDecorator]:
    """One family is checked with every change; all five are what `make test-suites` is for."""
    if family != FAST:
        return [pytest.mark.suites]
    return [pytest.mark.long] if name in SLOW else []


RUNS = [pytest.param(family, name, marks=marks(family, name)) for family in FAMILIES for name in checks_of(family)]


pytestmark = pytest.mark.skipif(
    not hasattr(PreTrainedModel, "activation_checkpointing_enable"), reason="the suites are those of transformers 5.23"
)


@pytest.mark.parametrize(("family", "name"), RUNS)
@pytest.mark.filterwarnings("ignore")
def test_a_result_passes_what_its_source_passes(family: str, name: str) -> None:
    known = recorded()[family][name]
    for kind in SUBJECTS:
        found, reason = outcome(name, subject(family, kind))
        assert found == known[kind], f"{kind}: {reason}"


def test_the_page_says_what_was_found() -> None:
    known = recorded()
    assert known.keys() == FAMILIES.keys()
    assert {family: sorted(checks) for family, checks in known.items()} == {
        family: sorted(checks_of(family)) for family in FAMILIES
    }
    assert not worse(known)
    assert tables(known) in PAGE.read_text(encoding="utf-8")


def test_a_check_that_fails_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """And one that changes what it was given."""

    def broken(checked: Subject) -> None:
        assert checked.target == "source"

    def careless(checked: Subject) -> None:
        checked.made.config.use_cache = not checked.made.config.use_cache

    def nothing(checked: Subject) -> None:
        raise DoesNotApply("no experts")

    for check in (broken, careless, nothing):
        monkeypatch.setitem(CHECKS, check.__name__, check)
    made = Subject("llama", "source", torch.nn.Identity())
    made.made.config = subject(FAST, "source").config
    assert outcome("broken", made) == (PASSES, "")
    assert outcome("broken", Subject("llama", "mla", made.made))[0] == FAILS
    assert outcome("nothing", made)[1] == "no experts"
    with pytest.raises(AssertionError, match="careless changed the model"):
        outcome("careless", made)
    found = {"llama": {"broken": {"source": PASSES, **dict.fromkeys(TARGETS, FAILS)}}}
    assert worse(found) == [f"llama: broken: {kind}" for kind in TARGETS]
