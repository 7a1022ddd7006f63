"""How much work a closed-form fit may do, whatever it fits."""

from __future__ import annotations

from dataclasses import dataclass

from attnedit.compiler.errors import UsageError


@dataclass(frozen=True)
class FitOptions:
    """How much work the closed-form fit may do (docs/notebook/2026-11-closed-form.md has what each buys).

    Attributes:
        alternations: rounds of query-side and latent-side least squares, each followed by the output side's.
        latent_side: without it, a round is the query side and the output side only.
        iterations: conjugate-gradient steps of each of the first two; few regularise where queries are few.
        output_queries: sampled queries, over all calibration sequences, of the output regression; see
            `attnedit.passes.site_sample.sampled_queries`.
        logit_queries: sampled queries of the logits' least squares.
        exact_stream: whether hidden states are computed in the model's own dtype; else in bfloat16 where the
            processor multiplies that faster.
    """

    alternations: int = 2
    latent_side: bool = True
    iterations: int = 8
    output_queries: int = 16384
    logit_queries: int = 16384
    exact_stream: bool = True

    @classmethod
    def of(cls, alternations: int) -> FitOptions:
        """Settings for a number of alternations; up to one is the quick job, on few queries, without the latent side.

        Raises:
            UsageError: the number is negative.
        """
        if alternations < 0:
            raise UsageError(f"alternations must not be negative, got {alternations}")
        if alternations > 1:
            return cls(alternations)
        return cls(
            alternations, latent_side=False, iterations=3, output_queries=8192, logit_queries=2048, exact_stream=False
        )

    @property
    def logit_share(self) -> float:
        """Of the output regression's queries, those that the logits' least squares take."""
        return min(1.0, self.logit_queries / self.output_queries)
