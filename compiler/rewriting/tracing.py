"""Traces what the author of a rewrite wrote, into the same form that captured graphs have."""

from __future__ import annotations

import inspect
import traceback
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from attnedit.compiler.capture.export import PROBE_DTYPE, export_program, record_children
from attnedit.compiler.capture.forwards import PAST as PROBED_PAST
from attnedit.compiler.capture.normalise import clean, raise_children
from attnedit.compiler.capture.sites import AttentionSite
from attnedit.compiler.compatibility.torch_names import pytree
from attnedit.compiler.errors import CaptureError, RewriteError
from attnedit.compiler.graph.anchor import ANCHOR
from attnedit.compiler.graph.modules import shadow
from attnedit.compiler.graph.spec import BATCH, LENGTH
from attnedit.compiler.graph.surgery import prune, unlift
from attnedit.compiler.rewriting.language import LEGEND, AttentionUse, Speaking, known_sizes, shape_letters, speaking

PAST = 23
"""Cached tokens in traces; a prime like the probe's sizes."""
FREE = (29, 31, 37, 41, 43, 47, 53)
"""Sizes of letters that only a match knows."""
HINTS = {BATCH: "B", LENGTH: "T", LENGTH + PAST: "S", LENGTH + PROBED_PAST: "S"}
PARTS = "parts"
_PAST = "_past"


@dataclass(frozen=True)
class Traced:
    """A traced function.

    Attributes:
        graph: placeholders by the names of the inputs; targets of child modules and tensors are those of the parts.
        outputs: what it returns.
        constants: tensors made in the code, by their get_attr target.
        uses: calls of `attention`, in the order of the graph's anchors.
    """

    graph: fx.Graph
    outputs: tuple[fx.Node, ...]
    constants: Mapping[str, Tensor]
    uses: tuple[AttentionUse, ...]


def place_of(function: Callable[..., Any]) -> str:
    """File and line of a function, for messages."""
    try:
        lines, first = inspect.getsourcelines(function)
        skipped = next((i for i, line in enumerate(lines) if line.lstrip().startswith("def ")), 0)
        return f"{Path(inspect.getsourcefile(function) or '?').name}:{first + skipped}"
    except (OSError, TypeError):
        code = getattr(inspect.unwrap(function), "__code__", None)
        return f"{Path(code.co_filename).name}:{code.co_firstlineno}" if code else "?"


def as_forward(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function under the name "forward": torch keeps source lines of functions of that name only."""
    plain = getattr(function, "__func__", function)
    if not isinstance(plain, types.FunctionType):
        return function
    code = plain.__code__.replace(co_name="forward")
    renamed = types.FunctionType(code, plain.__globals__, "forward", plain.__defaults__, plain.__closure__)
    renamed.__kwdefaults__ = plain.__kwdefaults__
    owner = getattr(function, "__self__", None)
    return renamed if owner is None else types.MethodType(renamed, owner)


def parameters_of(function: Callable[..., Any], skip: int = 0) -> list[str]:
    """Names of a function's parameters, each of which must be a plain one.

    Raises:
        RewriteError: it has ``*args``, ``**kwargs`` or defaults.
    """
    parameters = list(inspect.signature(function).parameters.values())[skip:]
    plain = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    for parameter in parameters:
        if parameter.kind not in plain or parameter.default is not inspect.Parameter.empty:
            raise RewriteError(
                f"{function.__qualname__} ({place_of(function)}): parameter {parameter.name} is no capture; every "
                "capture is a plain parameter without default, so that nothing is let through unseen"
            )
    return [parameter.name for parameter in parameters]


def example(name: str, where: str, site: AttentionSite, free: dict[str, int]) -> Tensor:
    """A meta tensor of the shape that a capture's name ends in; `free` remembers sizes of other letters.

    Raises:
        RewriteError: the name has no shape.
    """
    letters = shape_letters(name)
    if letters is None:
        raise RewriteError(
            f"{where}: capture {name!r} does not say its shape; end its name in one letter per dim ({LEGEND}), "
            "such as key_BGTd"
        )
    sizes = {"B": BATCH, "T": LENGTH, "S": LENGTH, **known_sizes(site)}
    shape = []
    for letter in letters:
        if letter not in sizes and not letter.isupper():
            raise RewriteError(f"{where}: capture {name!r}: this site has no size {letter!r} ({LEGEND})")
        shape.append(sizes[letter] if letter in sizes else free.setdefault(letter, FREE[len(free) % len(FREE)]))
    return torch.empty(shape, dtype=PROBE_DTYPE, device="meta")


def dynamic_dims(name: str) -> dict[int, Any]:
    """The dims of a capture that change from call to call."""
    letters = shape_letters(name) or ""
    return {dim: torch.export.Dim.AUTO for dim, letter in enumerate(letters) if letter in "BTS"}


class _Code(nn.Module):
    """Author code as a module, for torch.export."""

    def __init__(self, call: Callable[[dict[str, Any], nn.Module], Any], names: list[str], parts: nn.Module) -> None:
        super().__init__()
        self._call, self._names = call, names
        self.parts = parts
        self.speech: list[Speaking] = []

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        given = dict(zip(self._names, tensors, strict=True))
        self.speech[0].past = given.pop(_PAST)
        output = self._call(given, self.parts)
        found = list(output) if isinstance(output, tuple | list) else [output]
        if not all(isinstance(value, Tensor) for value in found):
            raise RewriteError(f"returns {type(output).__name__}; expected a tensor, or a tuple of tensors")
        return found


def trace(
    call: Callable[[dict[str, Any], nn.Module], Any],
    function: Callable[..., Any],
    inputs: Mapping[str, Tensor],
    dynamic: Mapping[str, dict[int, Any]],
    same: Mapping[str, Any] | None,
    captures: Mapping[str, Any],
    parts: nn.Module | None = None,
) -> Traced:
    """Trace author code.

    Args:
        call: runs it: ``call(inputs by name, parts on meta)``.
        function: what the author wrote, for messages.
        inputs: meta tensors by name.
        dynamic: their dims without fixed size, as torch.export takes them.
        same: see `Speaking`; a text in it names an input.
        captures: see `Speaking`.
        parts: new modules that the code calls.

    Raises:
        RewriteError: the code fails, or does something that a graph cannot hold; the message has the source line.
    """
    where = f"{function.__qualname__} ({place_of(function)})"
    copied = shadow(nn.Module() if parts is None else parts, ANCHOR, "meta", PROBE_DTYPE)
    names = [*inputs, _PAST]
    speech = Speaking(None, captures, torch.empty(0))

    def run(given: dict[str, Any], new: nn.Module) -> Any:
        if same is not None:
            speech.same = {name: given[value] if isinstance(value, str) else value for name, value in same.items()}
        speech.uses.clear()
        return call(given, new)

    code = _Code(run, names, copied).eval()
    code.speech.append(speech)
    tensors = (*inputs.values(), torch.empty(PAST, dtype=PROBE_DTYPE, device="meta"))
    shapes = (tuple(dynamic.get(name, {}) if name != _PAST else {0: torch.export.Dim.AUTO} for name in names),)
    children, handles = record_children(copied)
    dtype = torch.get_default_dtype()
    try:
        # Loading builds models on the meta device and in the checkpoint's dtype; constants in the code are neither.
        torch.set_default_dtype(torch.float32)
        with speaking(speech), torch.device("cpu"):
            program = export_program(code, tensors, shapes)
    except RewriteError as error:
        raise RewriteError(f"{where}: {error}") from error
    except CaptureError as error:
        reason = str(error).removeprefix("torch.export failed: ")
        raise RewriteError(
            f"{_line_of(error, function) or where}: {reason}; write plain torch code on the captures"
        ) from error
    except Exception as error:  # author code may raise anything
        raise RewriteError(f"{_line_of(error, function) or where}: {type(error).__name__}: {error}") from error
    finally:
        torch.set_default_dtype(dtype)
        for handle in handles:
            handle.remove()
    return _assemble(program, names, children, where, dynamic, tuple(speech.uses))


def _line_of(error: BaseException, function: Callable[..., Any]) -> str | None:
    """The author's line that an error came from."""
    file = inspect.unwrap(function).__code__.co_filename
    current: BaseException | None = error
    while current is not None:
        frames = [frame for frame in traceback.extract_tb(current.__traceback__) if frame.filename == file]
        if frames:
            return f"{function.__qualname__} ({Path(file).name}:{frames[-1].lineno})"
        current = current.__cause__ or current.__context__
    return None


def _assumed(size: Any, program: torch.export.ExportedProgram) -> str | None:
    """What a trace took for granted of a size that is free."""
    expression = size if isinstance(size, int) else size.node.expr
    if isinstance(expression, int) or expression.is_number:
        return str(expression)
    limits = program.range_constraints.get(expression)
    if limits is None:
        return None
    if limits.lower > 4:  # sums of two sizes, of which none is below 2 in a trace
        return f"at least {limits.lower}"
    return f"at most {limits.upper}" if limits.upper < 2**31 else None


def _assemble(
    program: torch.export.ExportedProgram,
    names: list[str],
    children: list[Any],
    where: str,
    dynamic: Mapping[str, dict[int, Any]],
    uses: tuple[AttentionUse, ...],
) -> Traced:
    graph = fx.Graph()
    given = iter(names)

    def argument(node: fx.Node) -> fx.Node:
        name = next(given)
        for dim in dynamic.get(name, {}):
            if assumed := _assumed(node.meta["val"].shape[dim], program):
                raise RewriteError(
                    f"{where}: takes dim {dim} of {name} to be {assumed}, but it changes from call to call; do "
                    "not compare sizes in Python, and give reshape sizes read from a tensor's shape"
                )
        return graph.placeholder(name)

    try:
        outputs, constants = unlift(program, graph, PARTS, argument, "constant_")
    except CaptureError as error:
        raise RewriteError(
            f"{where}: {error}; write plain torch code, and return tensors that need no input from parts()"
        ) from error
    graph.output(tuple(outputs))
    clean(graph)
    raise_children(graph, children, PARTS)
    prune(graph)
    final = next(node for node in graph.nodes if node.op == "output")
    return Traced(graph, tuple(pytree.tree_leaves(final.args)), constants, uses)
