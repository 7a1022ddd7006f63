"""Patterns: an author's function, traced, and found in the graph of an attention site.

Nothing is matched by name or by how something was spelled: a reshape is its input and the shape it gives, a cast its
input and dtype, default arguments count as given, and factors and summands may change places.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from attnedit.compiler.capture.sites import AttentionSite
from attnedit.compiler.errors import RewriteError
from attnedit.compiler.graph.dataflow import aten, is_size, value_ancestors, where
from attnedit.compiler.rewriting.canonical import Weight, arguments_of, called, size_of, target_of, value_of
from attnedit.compiler.rewriting.language import SETTINGS, AttentionUse, known_sizes, shape_letters
from attnedit.compiler.rewriting.tracing import (
    Traced,
    as_forward,
    dynamic_dims,
    example,
    parameters_of,
    place_of,
    trace,
)

ANCHOR_OP = torch.ops.attnedit.attention.default
_STAND_INS: dict[str, Any] = {"scale": 1009.25, "softcap": 1013.25, "window": 1019}
_COMMUTE = (aten.add.Tensor, aten.mul.Tensor)


Bound = fx.Node | Weight | int | float | bool | None
"""What a capture stands for: a node, a weight, or a constant."""


@dataclass(frozen=True)
class Binding:
    """A match of a pattern.

    Attributes:
        captures: what each capture stands for.
        outputs: nodes whose values the pattern returns.
        inner: every node of the pattern, outputs too, as found in the graph.
        anchor: the attention among them, if any.
        uses: how the pattern called `attention`; one for the anchor.
    """

    captures: Mapping[str, Bound]
    outputs: tuple[fx.Node, ...]
    inner: frozenset[fx.Node]
    anchor: fx.Node | None
    uses: tuple[AttentionUse, ...]


@dataclass(frozen=True)
class Miss:
    """A failed match; false, and its reason is only made when somebody reads it.

    Attributes:
        node: where it failed.
        matched: how many nodes of the pattern had been found by then.
    """

    node: fx.Node
    matched: int
    _reason: Callable[[], str] = field(repr=False)

    def __bool__(self) -> bool:
        return False

    @property
    def reason(self) -> str:
        """What was expected, and what is there."""
        return self._reason()


@dataclass(frozen=True)
class _State:
    """What is bound so far; never changed in place, so that another order can be tried."""

    captures: dict[str, Bound]
    nodes: dict[fx.Node, fx.Node]
    sizes: dict[str, int]

    def with_capture(self, name: str, value: Bound, sizes: dict[str, int]) -> _State:
        return _State({**self.captures, name: value}, self.nodes, sizes)

    def with_node(self, pattern: fx.Node, found: fx.Node) -> _State:
        return _State(self.captures, {**self.nodes, pattern: found}, self.sizes)


@dataclass(frozen=True)
class Pattern:
    """A traced pattern for the sites of one kind.

    Attributes:
        name: of the function, for messages.
        place: its file and line.
        traced: its graph.
        sizes: of letters that are facts of the site.
        numbers: what stands for captured numbers in the trace, by name.
        memo: for whoever traces the replacements that go with it.
    """

    name: str
    place: str
    traced: Traced
    sizes: Mapping[str, int]
    numbers: Mapping[str, Any]
    memo: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, function: Callable[..., Any], site: AttentionSite) -> Pattern:
        """Trace a pattern: an ordinary function, or a bound method, of captures.

        Raises:
            RewriteError: a capture says no shape, or the code cannot be traced.
        """
        place = place_of(function)
        free: dict[str, int] = {}
        inputs, stand_ins = {}, {}
        for name in parameters_of(function):
            if name in ("mask", "sinks"):
                inputs[name] = example("mask_1HTS" if name == "mask" else "sinks_H", place, site, free)
            elif name in _STAND_INS:
                stand_ins[name] = _STAND_INS[name]
            else:
                inputs[name] = example(name, f"{function.__qualname__} ({place})", site, free)
        captured, code = dict(stand_ins), as_forward(function)

        def call(given: dict[str, Any], _: nn.Module) -> Any:
            for name in ("mask", "sinks"):
                if name in given:
                    captured[name] = given[name]
            return code(**given, **stand_ins)

        dynamic = {name: dynamic_dims(name) for name in inputs}
        traced = trace(call, function, inputs, dynamic, None, captured)
        for output in traced.outputs:
            if output.op == "placeholder":
                raise RewriteError(
                    f"{function.__qualname__} ({place}) returns its capture {output.target} as it came: there is "
                    "nothing to find; return the value that the replacement takes the place of"
                )
        return cls(function.__qualname__, place, traced, known_sizes(site), stand_ins)

    def find(self, root: fx.GraphModule) -> Iterator[Binding | Miss]:
        """Try every node of a graph as the pattern's first output; one binding or miss for each that comes near."""
        first = self.traced.outputs[0]
        for node in root.graph.nodes:
            if target_of(node, root) == target_of(first, root):
                yield _Search(self, root).run(node)

    def absent(self) -> Miss:
        """The miss of a graph in which no node does what the pattern returns."""
        first = self.traced.outputs[0]
        return Miss(first, 0, lambda: f"no node is {called(first)}, which {self.name} ({self.place}) returns")


class _Search:
    """One attempt to find a pattern at one node."""

    def __init__(self, pattern: Pattern, root: fx.GraphModule) -> None:
        self.pattern, self.root = pattern, root
        self.nearest: Miss | None = None
        anchors = [n for n in pattern.traced.graph.nodes if n.target is ANCHOR_OP]
        self.uses = dict(zip(anchors, pattern.traced.uses, strict=True))

    def run(self, start: fx.Node) -> Binding | Miss:
        outputs = self.pattern.traced.outputs
        state: _State | None = self._value(outputs[0], start, _State({}, {}, {}))
        for output in outputs[1:]:
            if state is None:
                break
            given: _State = state
            tries = (
                self._value(output, n, given)
                for n in self.root.graph.nodes
                if target_of(n, self.root) == target_of(output, self.root)
            )
            state = given if output in given.nodes else next((found for found in tries if found), None)
        if state is None:
            assert self.nearest is not None
            return self.nearest
        inner = frozenset(state.nodes.values())
        found = tuple(state.nodes[output] for output in outputs)
        anchor = next((state.nodes[n] for n in self.uses), None)
        for node in inner - set(found) if anchor is not None else ():
            # Other values stay for those who use them; of attention there can be only one.
            outside = next((user for user in node.users if user not in inner), None)
            if outside is not None and anchor in value_ancestors(node):
                return self._miss(node, state, _used_by(outside))
        return Binding(state.captures, found, inner, anchor, self.pattern.traced.uses)

    def _miss(self, node: fx.Node, state: _State, reason: Callable[[], str]) -> Miss:
        miss = Miss(node, len(state.nodes), lambda: f"{where(node)}: {reason()}")
        if self.nearest is None or miss.matched > self.nearest.matched:
            self.nearest = miss
        return miss

    def _value(self, expected: Any, found: Any, state: _State, near: fx.Node | None = None) -> _State | None:
        """Match one argument; None where it differs, which is noted."""
        at = found if isinstance(found, fx.Node) else near
        if isinstance(expected, fx.Node) and expected.op == "placeholder":
            return self._capture(str(expected.target), found, state, at)
        if number := next(
            (n for n, value in self.pattern.numbers.items() if type(expected) is type(value) and value == expected),
            None,
        ):
            return self._capture(number, found, state, at)
        if isinstance(expected, fx.Node) and not is_size(expected):
            if isinstance(found, fx.Node):
                return self._node(expected, found, state)
            return self._differs(expected, found, state, at)
        if isinstance(expected, list | tuple):
            if not isinstance(found, list | tuple) or len(found) != len(expected):
                return self._differs(expected, found, state, at)
            current: _State | None = state
            for one, other in zip(expected, found, strict=True):
                current = None if current is None else self._value(one, other, current, near)
            return current
        return state if size_of(expected) == size_of(found) else self._differs(expected, found, state, at)

    def _differs(self, expected: Any, found: Any, state: _State, at: fx.Node | None) -> _State | None:
        node = at or next(iter(self.root.graph.nodes))
        expected_text = called(expected) if isinstance(expected, fx.Node) else repr(size_of(expected))
        self._miss(
            node,
            state,
            lambda: (
                f"has {called(found) if isinstance(found, fx.Node) else size_of(found)} where the pattern has "
                f"{expected_text}"
            ),
        )
        return None

    def _node(self, expected: fx.Node, found: fx.Node, state: _State) -> _State | None:
        if expected in state.nodes:
            return state if state.nodes[expected] is found else self._differs(expected, found, state, found)
        if expected.op == "get_attr":
            return self._constant(expected, found, state)
        if target_of(expected, self.root) != target_of(found, self.root):
            expected_at = where(expected).partition(" (")[2].rstrip(")")
            self._miss(
                found,
                state,
                lambda: (
                    f"is {called(found)}, the pattern expects {called(expected)}"
                    + (f" ({expected_at})" if expected_at else "")
                ),
            )
            return None
        mine, theirs = arguments_of(expected, self.root), arguments_of(found, self.root)
        if expected.target is ANCHOR_OP:
            return self._anchor(expected, found, mine, theirs, state)
        result = self._all(mine, theirs, state, found)
        if result is None and expected.target in _COMMUTE:
            swapped = {**theirs, "self": theirs["other"], "other": theirs["self"]}
            result = self._all(mine, swapped, state, found)
        return None if result is None else result.with_node(expected, found)

    def _all(self, mine: dict[str, Any], theirs: dict[str, Any], state: _State, found: fx.Node) -> _State | None:
        current: _State | None = state
        for name, value in mine.items():
            current = None if current is None else self._value(value, theirs.get(name), current, found)
        return current

    def _anchor(
        self, expected: fx.Node, found: fx.Node, mine: dict[str, Any], theirs: dict[str, Any], state: _State
    ) -> _State | None:
        use = self.uses[expected]
        current: _State | None = state
        for name in ("q", "k", "v", *SETTINGS):
            if current is None or name in use.open:
                continue
            if name in use.captured:
                current = current.with_capture(use.captured[name], theirs[name], current.sizes)
            else:
                current = self._value(mine[name], theirs[name], current, found)
        return None if current is None else current.with_node(expected, found)

    def _capture(self, name: str, found: Any, state: _State, near: fx.Node | None) -> _State | None:
        node = near or next(iter(self.root.graph.nodes))
        if name in state.captures:
            if state.captures[name] is found or state.captures[name] == found:
                return state
            other = state.captures[name]
            self._miss(
                node, state, lambda: f"the pattern has {name} twice, here it is {_shown(found)}, before {_shown(other)}"
            )
            return None
        letters = shape_letters(name)
        if letters is None:
            return state.with_capture(name, found, state.sizes)
        value = value_of(found, self.root)
        shape = tuple(value.shape) if isinstance(value, torch.Tensor) else None
        sizes = dict(state.sizes)
        fits = shape is not None and len(shape) == len(letters)
        for letter, size in zip(letters, shape or (), strict=False):
            if letter in "BTS":
                hint = size_of(size)
                fits &= hint == letter or (letter == "S" and hint == "T") or (letter == "B" and hint == 1)
            else:
                fits &= isinstance(size, int) and {**self.pattern.sizes, **sizes}.setdefault(letter, size) == size
                sizes.setdefault(letter, size if isinstance(size, int) else -1)
        if not fits:
            self._miss(node, state, lambda: f"has shape {_shape(shape)}, which is not {name}: {self._sizes(letters)}")
            return None
        return state.with_capture(name, found, sizes)

    def _sizes(self, letters: str) -> str:
        return f"[{', '.join(str(self.pattern.sizes.get(letter, letter)) for letter in letters)}]"

    def _constant(self, expected: fx.Node, found: fx.Node, state: _State) -> _State | None:
        wanted = self.pattern.traced.constants.get(str(expected.target))
        value = operator.attrgetter(str(found.target))(self.root) if found.op == "get_attr" else None
        if isinstance(value, torch.Tensor) and wanted is not None and not value.is_meta and torch.equal(wanted, value):
            return state.with_node(expected, found)
        self._miss(found, state, lambda: f"is not the constant that the pattern has ({wanted})")
        return None


def _used_by(user: fx.Node) -> Callable[[], str]:
    return lambda: f"its value is also used by {where(user)}, outside the pattern"


def _shown(value: Any) -> str:
    return f"node {value.name}" if isinstance(value, fx.Node) else str(value)


def _shape(shape: tuple[Any, ...] | None) -> str:
    return "none" if shape is None else f"[{', '.join(str(size_of(size)) for size in shape)}]"
