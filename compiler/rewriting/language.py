"""What patterns and replacements are written in, besides plain torch code: `attention`, `cache`, and names of shapes.

A parameter of a pattern is a capture. Its name ends in the shape of the tensor that it stands for, one letter per dim::

    B batch   T new tokens   S tokens attended to   D hidden size   H query heads   G key/value heads
    d size of queries and keys   v size of values   r columns of cos and sin   1 one

Other capital letters are sizes that the match finds. The settings of `attention` (``mask``, ``sinks``, ``scale``,
``softcap``, ``window``) are captured by parameters of just that name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attnedit.compiler.capture.sites import AttentionSite
from attnedit.compiler.errors import RewriteError
from attnedit.compiler.graph.anchor import attention as anchor_op

SETTINGS = ("mask", "scale", "softcap", "sinks", "window")
"""Of the anchor, after query, key and value; the layer follows."""
LEGEND = "B batch, T new tokens, S keys, D hidden, H heads, G key/value heads, d head, v value, r rotary columns, 1"

_SHAPE = re.compile(r"_([A-Z1][A-Za-z1]*)$")


class _Same:
    """The setting is left open: any in a pattern, the matched one in a replacement."""

    def __repr__(self) -> str:
        return "SAME"


SAME: Any = _Same()


def shape_letters(name: str) -> str | None:
    """The shape that a name ends in.

    >>> shape_letters("key_BGTd"), shape_letters("mask"), shape_letters("attention_mask")
    ('BGTd', None, None)
    """
    found = _SHAPE.search(name)
    return found[1] if found else None


def known_sizes(site: AttentionSite) -> dict[str, int]:
    """Letters whose size is a fact of the site."""
    hidden = site.node(site.hidden).meta["val"].shape[-1]
    sizes = {"D": hidden, "H": site.num_attention_heads, "G": site.num_key_value_heads}
    sizes |= {"d": site.head_dim, "v": site.v_head_dim, "1": 1}
    if site.rope is not None:
        sizes["r"] = site.node(site.rope.cos).meta["val"].shape[-1]
    return sizes


@dataclass
class AttentionUse:
    """One call of `attention` while author code is traced.

    Attributes:
        open: settings left open.
        captured: setting -> name of the capture that was given for it.
    """

    open: frozenset[str]
    captured: dict[str, str]


@dataclass
class Speaking:
    """What `attention` and `cache` mean while a pattern or a replacement is traced.

    Attributes:
        same: values for settings left open; None in a pattern.
        captures: stand-ins for captured numbers, by the capture's name.
        past: stands for the tokens cached before, [P].
        uses: calls of `attention` so far, in order.
    """

    same: Mapping[str, Any] | None
    captures: Mapping[str, Any]
    past: Tensor
    uses: list[AttentionUse] = field(default_factory=list)


_speaking: ContextVar[Speaking | None] = ContextVar("attnedit_speaking", default=None)


@contextmanager
def speaking(speech: Speaking) -> Iterator[None]:
    """Let `attention` and `cache` be traced while inside."""
    token = _speaking.set(speech)
    try:
        yield
    finally:
        _speaking.reset(token)


def attention(
    query_BHTd: Tensor,
    key_BGSd: Tensor,
    value_BGSv: Tensor,
    mask: Tensor | None = SAME,
    *,
    scale: float | Tensor = SAME,
    softcap: float | None = SAME,
    sinks: Tensor | None = SAME,
    window: int | None = SAME,
) -> Tensor:
    """Attend, as `attnedit::attention` does; for patterns and replacements.

    A setting that is left out is any in a pattern, and the matched site's in a replacement. Keys and values are cached
    as they come in, unless they come from `cache`.

    Args:
        query_BHTd: queries, rotated where the model rotates.
        key_BGSd: keys; G divides H, and may be another number than the source's.
        value_BGSv: values.
        mask: added to the logits, or boolean (True: attend), or None for causal.
        scale: factor on the logits.
        softcap: logits become ``softcap * tanh(logits / softcap)``; None for uncapped.
        sinks: [H], a logit per head that takes probability and gives nothing; or None.
        window: HF's sliding_window, counting the token itself; or None.

    Returns:
        [B, T, H, v].

    Raises:
        RewriteError: called outside a pattern or replacement.
    """
    speech = _speaking.get()
    if speech is None:
        raise RewriteError("attention() was called outside a pattern or replacement; there it stands for the anchor op")
    given = {"mask": mask, "scale": scale, "softcap": softcap, "sinks": sinks, "window": window}
    left = frozenset(name for name, value in given.items() if value is SAME)
    captured = {
        setting: name
        for setting, value in given.items()
        for name, stand_in in speech.captures.items()
        if value is stand_in
    }
    speech.uses.append(AttentionUse(left, captured))
    same = speech.same or {"mask": None, "scale": 1.0, "softcap": None, "sinks": None, "window": None}
    values = {name: same[name] if name in left else value for name, value in given.items()}
    output: Tensor = anchor_op(query_BHTd, key_BGSd, value_BGSv, *(values[name] for name in SETTINGS), -1)
    return output


def cache(key_BGTd: Tensor, value_BGTv: Tensor) -> tuple[Tensor, Tensor]:
    """Append to the layer's cache, and return all that it holds; for replacements that cache something of their own.

    Args:
        key_BGTd: what the cache calls keys, any dtype and last dim.
        value_BGTv: what it calls values.

    Returns:
        [B, G, S, ..] each: earlier tokens first.

    Raises:
        RewriteError: called outside a pattern or replacement.
    """
    speech = _speaking.get()
    if speech is None:
        raise RewriteError("cache() was called outside a pattern or replacement; there it stands for the model's cache")
    keys, values = cache_op(key_BGTd, value_BGTv, speech.past, -1)
    return keys, values


@torch.library.custom_op("attnedit::cache", mutates_args=())
def cache_op(key: Tensor, value: Tensor, past: Tensor | None, layer: int) -> tuple[Tensor, Tensor]:
    """The cache as one graph node, empty before: `past` [P] makes traced lengths P + T. `layer` names the slot."""
    return key.clone(), value.clone()


@cache_op.register_fake
def _cache_fake(key: Tensor, value: Tensor, past: Tensor | None, layer: int) -> tuple[Tensor, Tensor]:
    length = key.shape[2] + (0 if past is None else past.shape[0])
    return tuple(x.new_empty((x.shape[0], x.shape[1], length, x.shape[3])) for x in (key, value))  # type: ignore[return-value]
