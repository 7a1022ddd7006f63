"""The target "gateswa": layers get a gated sliding window; some stay full, and may become something else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from torch import Tensor, fx
from transformers import PreTrainedModel

from attnedit.compiler.capture.sites import AttentionSite
from attnedit.compiler.errors import UsageError
from attnedit.passes.gateswa.fit import WindowFit, build, fit_window
from attnedit.passes.gateswa.options import (
    DEFAULT_GATE,
    DEFAULT_SINKS,
    DEFAULT_WINDOW,
    FullLayers,
    GateSWAOptions,
    Sinks,
    full_count,
    full_layers_of,
)
from attnedit.passes.questions import Claim, Question, TargetOptions
from attnedit.passes.sample import LayerSample
from attnedit.passes.target import AttentionTarget
from attnedit.targets.attention.gateswa.config import GateSWAConfig
from attnedit.targets.attention.gateswa.cost import gateswa_values
from attnedit.targets.attention.gateswa.graph import GATESWA_MODULE
from attnedit.targets.attention.kinds import KINDS


@dataclass(frozen=True)
class WindowShape:
    """What a layer with a window caches; data always shows what it loses.

    Attributes:
        config: of the new attention.
        values: cached values per token, averaged over the context.
    """

    config: GateSWAConfig
    values: float
    exact = False


class WindowTarget(AttentionTarget[WindowShape, WindowFit]):
    """A window in most layers; see docs/method.md.

    Attributes:
        form: of the windows.
        full_layers: which layers stay full, or how many; None for a quarter, or by the budget.
    """

    name = "gateswa"
    kind = KINDS[GATESWA_MODULE]
    description = "a gated sliding window in most layers"
    reads = (AttentionTarget.reads - {"allocation"}) | {
        *("window", "full_layers", "gate", "sinks", "profile", "kernel_dims", "engine")
    }
    leaves = True
    begins = True
    default_budget = None
    stage = "windows"
    does = "fit windows; choose full layers by loss"
    fits = WindowFit
    queries = 16384
    form: GateSWAOptions = GateSWAOptions()
    full_layers: FullLayers = None

    def configured(self, options: TargetOptions) -> Self:
        """A copy with the form that is asked for."""
        result = super().configured(options)
        result.full_layers = options.asked("full_layers", None)
        result.form = GateSWAOptions(
            window=options.asked("window", DEFAULT_WINDOW),
            gate=options.asked("gate", DEFAULT_GATE),
            sinks=Sinks.parse(options.asked("sinks", DEFAULT_SINKS)),
        )
        return result

    def plan(self, question: Question) -> Claim:
        """A window in every layer that does not stay full."""
        share = min(1.0, self.cached_tokens / question.length)
        configs = {site.name: self.form.config(site) for site in question.chosen}
        shapes = {name: WindowShape(config, gateswa_values(config) * share) for name, config in configs.items()}
        if self.full_layers is None and question.budget is not None and question.last:
            windowed = {site.layer_idx: shapes[site.name].values for site in question.chosen}
            return Claim(shapes, full_count(question.budget, dict(question.before), windowed))
        full = full_layers_of(self.full_layers, question.chosen)
        named = [] if isinstance(full, int) else full
        return Claim({s.name: shapes[s.name] for s in question.chosen if s.layer_idx not in named}, full)

    @property
    def cached_tokens(self) -> int:
        """Of the window and the kept sinks."""
        return self.form.cached_tokens

    @property
    def exact_stream(self) -> bool:
        """Always: a quick job asks for few rounds of latent fits, of which there are none here."""
        return True

    def check_data(self, windows: Sequence[Tensor]) -> None:
        """Refuse windows of calibration data that show nothing of what the attention's windows take away."""
        longest = max(part.shape[1] for part in windows)
        if longest <= self.form.cached_tokens:
            raise UsageError(
                f"window {self.form.window}: calibration windows of {longest} tokens lose nothing to it; "
                "give a smaller window"
            )

    def fit(self, samples: Sequence[LayerSample], shape: WindowShape) -> WindowFit:
        """Sinks and output projection in closed form."""
        return fit_window(samples, shape.config)

    def build(
        self, model: PreTrainedModel, site: AttentionSite, shape: WindowShape, fit: WindowFit | None
    ) -> fx.GraphModule:
        """The graph with its weights."""
        if fit is None:
            raise AssertionError("a window always loses something")
        return build(model, site, shape.config, fit)
