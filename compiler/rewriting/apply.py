"""One rewrite over the graph of one site: match, check, replace, until nothing new is found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from attnedit.compiler.errors import RewriteError
from attnedit.compiler.graph import provenance
from attnedit.compiler.graph.dataflow import is_tensor, where
from attnedit.compiler.graph.masks import dense_mask
from attnedit.compiler.graph.spec import verify
from attnedit.compiler.graph.surgery import cut
from attnedit.compiler.rewriting.fuel import Fuel
from attnedit.compiler.rewriting.graft import SiteGraph, graft
from attnedit.compiler.rewriting.pattern import Binding, Miss, Pattern
from attnedit.compiler.rewriting.rewrite import Batch, Match, Reject, Rewrite, match_of, with_parts
from attnedit.compiler.rewriting.tracing import place_of


@dataclass(frozen=True)
class Applied:
    """One match that was rewritten.

    Attributes:
        match: with its parts.
        before: computes what the pattern returned and then the captures, from the arguments of the attention module.
        after: what the replacement returns; its parts are the live ones.
        captures: names of those that are tensors.
    """

    match: Match
    before: fx.GraphModule
    after: fx.GraphModule
    captures: tuple[str, ...]

    @torch.no_grad()
    def run(self, args: tuple[Any, ...], kwargs: Any) -> Batch:
        """Both on one call of the attention module."""
        name, site = self.match.site.mask, self.match.site
        if name in kwargs:
            hidden = next(v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor) and v.dim() == 3)
            kwargs = {**kwargs, name: dense_mask(kwargs[name], hidden, hidden.shape[1], site.window)}
        old, new = list(self.before(*args, **kwargs)), list(self.after(*args, **kwargs))
        return Batch(old[: len(new)], new, dict(zip(self.captures, old[len(new) :], strict=True)))


@dataclass
class Outcome:
    """What one rewrite did to one site.

    Attributes:
        decisions: of every match in turn, whether it was rewritten; a saved result records them.
        applied: those that were.
        rejected: reasons of those that were not.
        nearest: the miss that came closest, where nothing matched.
    """

    decisions: list[bool] = field(default_factory=list)
    applied: list[Applied] = field(default_factory=list)
    rejected: list[str] = field(default_factory=list)
    nearest: Miss | None = None

    @property
    def reason(self) -> str:
        """Why the site is as it was."""
        if self.rejected:
            return f"matched, but {self.rejected[0]}"
        return self.nearest.reason if self.nearest is not None else "no match"


def apply(
    rewrite: Rewrite, pattern: Pattern, state: SiteGraph, fuel: Fuel, replay: list[bool] | None = None
) -> Outcome:
    """Rewrite every match in a site's graph, which changes in place.

    Args:
        rewrite: the rewrite.
        pattern: its pattern, traced for this kind of site.
        state: the graph.
        fuel: how many more rewrites may be done.
        replay: decisions of an earlier run on the same source, followed without asking again.

    Raises:
        RewriteError: the rewrite is written wrongly.
    """
    outcome = Outcome()
    left: set[str] = set()
    while (binding := _next(rewrite, pattern, state, left, outcome)) is not None:
        match = match_of(state.site, state.module, binding)
        if replay is None:
            reject = _check(rewrite, match)
            if reject is not None:
                outcome.rejected.append(reject.reason)
            accepted = reject is None and fuel.take()
        else:
            accepted = len(outcome.decisions) < len(replay) and replay[len(outcome.decisions)]
        outcome.decisions.append(accepted)
        if not accepted:
            left.add(binding.outputs[0].name)
            continue
        new = make_parts(rewrite, match, state.root)
        old, names = state.root, [node.name for node in binding.outputs]
        results = graft(state, rewrite, match, binding, new, pattern.memo)
        made_by = f"{rewrite.name}.replacement ({place_of(rewrite.replacement)})"
        verify(state.root.graph, made_by, root=state.root, loose=state.site.mask, error=RewriteError)
        captured = {
            name: bound.name
            for name, bound in match.captures.items()
            if isinstance(bound, fx.Node) and is_tensor(bound)
        }
        before = cut(old, [*names, *captured.values()])
        applied = Applied(with_parts(match, new), before, cut(state.root, results), tuple(captured))
        outcome.applied.append(applied)
    return outcome


def _next(rewrite: Rewrite, pattern: Pattern, state: SiteGraph, left: set[str], outcome: Outcome) -> Binding | None:
    """The first match that is neither left alone already nor made by this very rewrite."""
    for found in pattern.find(state.root):
        if isinstance(found, Binding):
            if found.outputs[0].name in left:
                continue
            if not any(rewrite.identity in provenance.rules(node) for node in found.inner):
                return found
            node = found.outputs[0]
            found = Miss(node, len(found.inner), _made_by(rewrite, node))
        if outcome.nearest is None or found.matched > outcome.nearest.matched:
            outcome.nearest = found
    if outcome.nearest is None:
        outcome.nearest = pattern.absent()
    return None


def _made_by(rewrite: Rewrite, node: fx.Node) -> Callable[[], str]:
    return lambda: f"{where(node)}: {rewrite.name} made it"


def _check(rewrite: Rewrite, match: Match) -> Reject | None:
    place = f"{rewrite.name}.check ({place_of(rewrite.check)})"
    try:
        found: Any = rewrite.check(match)
    except Exception as error:  # author code may raise anything
        raise RewriteError(f"{place} at {match.site.name}: {type(error).__name__}: {error}") from error
    if found is not None and not isinstance(found, Reject):
        raise RewriteError(f"{place} returns {found!r}; expected None, or Reject with a reason")
    return found


def trace_patterns(rewrite: Rewrite) -> Callable[[SiteGraph], Pattern]:
    """Trace a pattern once for each kind of site."""
    known: dict[str, Pattern] = {}

    def pattern_for(state: SiteGraph) -> Pattern:
        kind = state.site.kind
        if kind not in known:
            known[kind] = Pattern.of(rewrite.pattern, state.site)
        return known[kind]

    return pattern_for


@dataclass(frozen=True)
class Batches:
    """Calibration data at a match, from the arguments of its attention module; computed anew each time it is read."""

    applied: Applied
    inputs: Sequence[Any]

    def __iter__(self) -> Iterator[Batch]:
        """One batch after another."""
        return (self.applied.run(given.args, given.kwargs) for given in self.inputs)


def make_parts(rewrite: Rewrite, match: Match, root: fx.GraphModule) -> nn.Module:
    """Make the parts of a match, in dtype and on the device of the output projection.

    Raises:
        RewriteError: a name is taken, or something is no part.
    """
    like = root.get_submodule(match.site.o_proj.module)
    weight = next(like.parameters())
    new = nn.Module()
    try:
        made = rewrite.parts(match)
    except Exception as error:  # author code may raise anything
        raise RewriteError(
            f"{rewrite.name}.parts ({place_of(rewrite.parts)}): {type(error).__name__}: {error}"
        ) from error
    for name, part in made.items():
        if not name.isidentifier() or hasattr(root, name):
            raise RewriteError(
                f"{rewrite.name}.parts ({place_of(rewrite.parts)}): {name!r} is "
                f"{'taken in ' + match.site.name if name.isidentifier() else 'no identifier'}; choose another name"
            )
        if isinstance(part, nn.Module):
            new.add_module(name, part.to(weight.dtype))
        elif isinstance(part, nn.Parameter):
            new.register_parameter(name, nn.Parameter(part.detach().to(weight.dtype), requires_grad=part.requires_grad))
        elif isinstance(part, Tensor):
            new.register_buffer(name, part.to(weight.dtype) if part.is_floating_point() else part)
        else:
            raise RewriteError(
                f"{rewrite.name}.parts ({place_of(rewrite.parts)}): {name} is a {type(part).__name__}; "
                "expected a module, a parameter or a tensor"
            )
    return new.to(weight.device) if not any(p.is_meta for p in (*new.parameters(), *new.buffers())) else new


def run_fit(rewrite: Rewrite, match: Match, batches: Iterable[Batch]) -> None:
    """Let the author set the parts; numbers that are not finite are refused.

    Raises:
        RewriteError: it fails, or leaves such numbers.
    """
    calls: dict[str, Callable[[], object]] = {"initialise": lambda: rewrite.initialise(match)}
    if (fit := rewrite.fit) is not None:
        calls["fit"] = lambda: fit(match, batches)
    for name, call in calls.items():
        function = getattr(rewrite, name)
        try:
            with torch.no_grad():
                call()
        except RewriteError:
            raise
        except Exception as error:  # author code may raise anything
            raise RewriteError(
                f"{rewrite.name}.{name} ({place_of(function)}) at {match.site.name}: {type(error).__name__}: {error}"
            ) from error
    for name, tensor in (*match.new.named_parameters(), *match.new.named_buffers()):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise RewriteError(f"{rewrite.name} leaves numbers in {name} at {match.site.name} that are not finite")
