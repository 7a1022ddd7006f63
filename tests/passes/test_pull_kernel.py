"""The kernel of the logits' least squares against float64."""

from __future__ import annotations

from interpreted import needs_triton, results_of


@needs_triton
def test_pulled_errors_equal_float64() -> None:
    found = results_of("pulled_error_cases.py")
    assert found["kernel"]
    assert len(found["errors"]) == 4
    assert {shape: error for shape, error in found["errors"].items() if not error < 1e-6} == {}
