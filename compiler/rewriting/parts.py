"""The new modules and tensors of a rewrite: made, and given their values."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, fx, nn

from attnedit.compiler.errors import RewriteError
from attnedit.compiler.rewriting.rewrite import Batch, Match, Rewrite
from attnedit.compiler.rewriting.tracing import place_of


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
