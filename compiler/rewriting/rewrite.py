"""What the author of a rewrite writes: `Rewrite`, and what it is given and gives back."""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, nn

from attnedit.compiler.capture.rope import rotated
from attnedit.compiler.capture.sites import AttentionSite
from attnedit.compiler.errors import RewriteError, UsageError
from attnedit.compiler.rewriting.canonical import Weight
from attnedit.compiler.rewriting.pattern import Binding, Bound
from attnedit.compiler.rewriting.tracing import place_of

Replaced: TypeAlias = Tensor | tuple[Tensor, ...]
"""What a pattern and its replacement return."""
FACTS = ("hidden", "query", "key", "value")
"""Nodes of a site that a replacement may use besides its captures."""


@dataclass(frozen=True)
class Contract:
    """What a rewrite promises of the values that it replaces; the driver holds it to that on real numbers.

    Attributes:
        kind: "exact": the same bits; "close": ``|new - old| <= atol * max|old| + rtol * |old|`` everywhere; "learned":
            nothing, the error is measured and reported.
        atol: tolerance of "close" as a fraction of the largest value, since models differ in scale.
        rtol: as a fraction of each value.
    """

    kind: Literal["exact", "close", "learned"]
    atol: float = 0.0
    rtol: float = 0.0

    def __str__(self) -> str:
        return f"close(atol={self.atol:g}, rtol={self.rtol:g})" if self.kind == "close" else self.kind


exact = Contract("exact")
learned = Contract("learned")


def close(atol: float, rtol: float) -> Contract:
    """A contract with tolerances: ``|new - old| <= atol * max|old| + rtol * |old|`` everywhere.

    Args:
        atol: as a fraction of the largest value, since models differ in scale.
        rtol: as a fraction of each value.

    Returns:
        The contract.

    >>> print(close(atol=1e-3, rtol=0.01))
    close(atol=0.001, rtol=0.01)
    """
    return Contract("close", atol, rtol)


@dataclass(frozen=True)
class Reject:
    """A match that must stay as it is.

    Attributes:
        reason: one line, in the words of a user of the model.
    """

    reason: str


@dataclass(frozen=True)
class Batch:
    """One batch of calibration data at a match.

    Attributes:
        before: what the pattern returns there, as a list of tensors.
        after: what the replacement returns, with the parts as they are.
        captures: what the captures that are tensors stand for, by name.
    """

    before: list[Tensor]
    after: list[Tensor]
    captures: Mapping[str, Tensor] = field(default_factory=dict)


def least_squares(batches: Iterable[Batch], ridge: float = 1e-3) -> Tensor:
    """The matrix per head that brings new values closest to old ones.

    Args:
        batches: the first old value of each [B, T, H, w], the first new one [B, T, H, v].
        ridge: added to the Gram matrices, as a fraction of their mean diagonal.

    Returns:
        [H, v, w], float64: old = new @ it.

    >>> new = torch.randn(1, 50, 2, 3)
    >>> found = least_squares([Batch(before=[2 * new], after=[new])], ridge=0)
    >>> torch.allclose(found, 2 * torch.eye(3).expand(2, 3, 3).double(), atol=1e-4)
    True
    """
    gram, cross = torch.zeros(()), torch.zeros(())
    for batch in batches:
        new, old = (values[0].double().flatten(0, 1).transpose(0, 1) for values in (batch.after, batch.before))
        gram, cross = gram + new.mT @ new, cross + new.mT @ old
    level = ridge * gram.diagonal(dim1=1, dim2=2).mean().clamp(min=1e-30)
    result: Tensor = torch.linalg.solve(gram + level * torch.eye(gram.shape[-1]).to(gram), cross)
    return result


@dataclass(frozen=True)
class Match:
    """One place where a pattern was found.

    Attributes:
        site: the facts of the attention site (`attnedit.compiler.capture.sites.AttentionSite`).
        module: the source's attention module. While a saved result loads, its weights have no values.
        captures: what each capture stands for: a node of the graph, a weight's name, or a constant.
        settings: of the matched attention: mask, scale, softcap, sinks, window; nodes and constants.
        new: the parts, once `Rewrite.parts` has made them.
    """

    site: AttentionSite
    module: nn.Module
    captures: Mapping[str, Bound]
    settings: Mapping[str, Bound]
    new: Any = None
    _tensors: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def hidden_size(self) -> int:
        """D, the size of the hidden states."""
        return int(self.site.node(self.site.hidden).meta["val"].shape[-1])

    @property
    def hidden(self) -> Tensor:
        """Hidden states [B, T, D]; in a replacement only, as `query`, `key`, `value`, `cos` and `sin`."""
        return self._tensor("hidden")

    @property
    def query(self) -> Tensor:
        """Queries before rope [B, H, T, d]."""
        return self._tensor("query")

    @property
    def key(self) -> Tensor:
        """Keys before rope [B, G, T, d]."""
        return self._tensor("key")

    @property
    def value(self) -> Tensor:
        """Values [B, G, T, v]."""
        return self._tensor("value")

    @property
    def cos(self) -> Tensor:
        """Cosines [B or 1, T, r]."""
        return self._tensor("cos")

    @property
    def sin(self) -> Tensor:
        """Sines [B or 1, T, r]."""
        return self._tensor("sin")

    def rotate(self, x_BHTd: Tensor) -> Tensor:
        """Apply the site's rotary embedding to queries or keys; in a replacement only.

        Args:
            x_BHTd: queries or keys before rope, H or G heads.

        Returns:
            The same shape and dtype, rotated; as it came where the site has no rotary embedding.

        Raises:
            RewriteError: called outside a replacement.

        Example:
            >>> query_BHTd = match.rotate(match.query)  # doctest: +SKIP
        """
        return x_BHTd if self.site.rope is None else rotated(x_BHTd, self.cos, self.sin, self.site.rope)

    def weight(self, capture: str) -> nn.Parameter:
        """The parameter that a capture of a weight stands for.

        Args:
            capture: the pattern's parameter.

        Returns:
            The source model's own parameter, not a copy.

        Raises:
            RewriteError: it stands for something else.

        Example:
            >>> match.new.gate.weight.copy_(match.weight("gate_HD"))  # doctest: +SKIP
        """
        bound = self.captures[capture]
        if not isinstance(bound, Weight):
            raise RewriteError(f"capture {capture} is no weight but {bound}")
        return self.module.get_parameter(bound.name)

    def _tensor(self, name: str) -> Tensor:
        if name not in self._tensors:
            why = "this site has none left" if self._tensors else "it has a value in replacement() only"
            raise RewriteError(f"{self.site.name}: match.{name}: {why}")
        return self._tensors[name]


class Rewrite:
    """A change of the graph of attention sites, wherever a pattern is found.

    A subclass has two ordinary functions of torch code. `pattern` is what to look for; its parameters are the captures.
    `replacement` takes a `Match` and the same captures, and returns what takes the place of the pattern's value. In
    both, `attention` stands for the attention of the model; `attnedit.compiler.rewriting.language` says how parameters
    are named.

    Options are fields: make the subclass a dataclass, of JSON values. A result that is saved records class and options,
    and loading it applies the rewrite again; so the class must be importable.

    Attributes:
        contract: what the replacement promises.

    >>> class Swap(Rewrite):
    ...     contract = exact
    ...     def pattern(self, x_BTD, y_BTD):
    ...         return x_BTD + y_BTD
    ...     def replacement(self, match, x_BTD, y_BTD):
    ...         return y_BTD + x_BTD
    >>> Swap().name, Swap().contract.kind
    ('Swap', 'exact')
    """

    contract: ClassVar[Contract] = learned

    pattern: Callable[..., Replaced]
    """``pattern(self, capture, ...)``: what to look for."""

    replacement: Callable[..., Replaced]
    """``replacement(self, match, capture, ...)``: what takes its place; captures by the pattern's names."""

    def check(self, match: Match) -> Reject | None:
        """Look closer at a match; every match is taken unless a subclass has this.

        Args:
            match: what was found, without values of tensors.

        Returns:
            None to rewrite it, a `Reject` with the reason to leave it.
        """
        return None

    def parts(self, match: Match) -> Mapping[str, nn.Module | nn.Parameter | Tensor]:
        """New modules, parameters and buffers by name; `match.new` has them in the replacement.

        Called again when a saved result is loaded, on the meta device: their shapes must follow from facts alone. They
        get the dtype and device of the output projection.

        Args:
            match: where the rewrite is applied.

        Returns:
            What is added to the attention module; nothing unless a subclass says so.
        """
        return {}

    def initialise(self, match: Match) -> None:
        """Give the parts values that follow from the source's weights (`match.module`).

        Args:
            match: with its parts in `match.new`, which are changed in place.
        """

    fit: Callable[[Match, Iterable[Batch]], object] | None = None
    """``fit(self, match, batches)``: give the parts values that follow from data, an iterable of `Batch`; read again,
    `after` is computed with the parts as they are then."""

    @property
    def name(self) -> str:
        """What reports call it."""
        return type(self).__qualname__.rpartition(".")[2]

    @property
    def identity(self) -> str:
        """Where it is defined, ``module:Class``: what provenance and saved results call it."""
        return f"{type(self).__module__}:{type(self).__qualname__}"

    @property
    def place(self) -> str:
        """File and line of its pattern."""
        return place_of(self.pattern)


def check_rewrite(rewrite: Rewrite) -> None:
    """Refuse a rewrite that lacks something, before any graph is looked at.

    Raises:
        RewriteError: says what.
    """
    if isinstance(rewrite, type) or not isinstance(rewrite, Rewrite):
        what = "a class; make an instance of it" if isinstance(rewrite, type) else f"a {type(rewrite).__name__}"
        raise RewriteError(
            f"{getattr(rewrite, '__name__', rewrite)!s} is {what}; expected an instance of a Rewrite subclass"
        )
    for name in ("pattern", "replacement"):
        if not callable(getattr(rewrite, name, None)):
            raise RewriteError(f"{rewrite.name} has no {name}(); a rewrite needs pattern() and replacement()")
    if not isinstance(rewrite.contract, Contract):
        raise RewriteError(
            f"{rewrite.name}.contract is {rewrite.contract!r}; expected exact, learned or close(atol, rtol)"
        )
    options_of(rewrite)


def options_of(rewrite: Rewrite) -> dict[str, Any]:
    """The fields of a rewrite as JSON values.

    Raises:
        RewriteError: it has options that a saved result could not hold.
    """
    if not dataclasses.is_dataclass(rewrite):
        if type(rewrite).__init__ is not object.__init__:
            raise RewriteError(
                f"{rewrite.name} has an __init__ of its own; make it a dataclass, whose fields are its options"
            )
        return {}
    values = {f.name: getattr(rewrite, f.name) for f in dataclasses.fields(rewrite) if f.init}
    for name, value in values.items():
        if not _is_json(value):
            raise RewriteError(
                f"{rewrite.name}.{name} is {value!r}; options must be JSON values, so that a result can be saved"
            )
    return values


def _is_json(value: Any) -> bool:
    try:
        return bool(json.loads(json.dumps(value)) == value)
    except (TypeError, ValueError):
        return False


def rewrite_from(identity: str, options: Mapping[str, Any]) -> Rewrite:
    """Make the rewrite that a saved result names.

    Raises:
        UsageError: it cannot be imported, or is no rewrite with these options.
    """
    module, _, qualified = identity.partition(":")
    hint = "install the package that defines it, or put its file on the path"
    if module == "__main__":
        hint = "it was defined in a script or notebook; define it there again, or move it to a module"
    try:
        found: Any = importlib.import_module(module)
        for part in qualified.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(
            f"this model was rewritten by {identity}, which cannot be imported ({error}); {hint}"
        ) from error
    # Before anything of it is called: a configuration file must not be able to call what it likes.
    if not (isinstance(found, type) and issubclass(found, Rewrite)):
        raise UsageError(f"config.json names the rewrite {identity}, which is no subclass of attnedit.Rewrite")
    try:
        rewrite: Rewrite = found(**options)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{identity} does not take the options that this model was rewritten with: {error}") from error
    return rewrite


def match_of(site: AttentionSite, module: nn.Module, binding: Binding) -> Match:
    """What the author is shown of a binding."""
    settings: dict[str, Any] = {}
    if binding.anchor is not None:
        settings = dict(zip(("mask", "scale", "softcap", "sinks", "window"), binding.anchor.args[3:8], strict=True))
    return Match(site, module, binding.captures, settings)


def with_parts(match: Match, new: nn.Module, tensors: Mapping[str, Tensor] | None = None) -> Match:
    """The same match, with parts and, in a replacement, tensors."""
    return dataclasses.replace(match, new=new, _tensors=tensors or {})
