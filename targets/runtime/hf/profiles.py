"""Forms of checkpoints that classes of transformers load, each for one kind of attention, which names it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import transformers
from transformers import CONFIG_MAPPING, PreTrainedModel

from attnedit.compiler.errors import UsageError
from attnedit.targets.attention.kind import AttentionKind
from attnedit.targets.attention.kinds import KINDS, kinds_in, known_kinds
from attnedit.targets.runtime.hf.native import OTHER, Native
from attnedit.targets.runtime.staging import check_choice

REMOTE_PROFILE = "remote"
PROFILES = (*(name for kind in KINDS.values() for name in kind.profiles), REMOTE_PROFILE)


@dataclass(frozen=True)
class Profile:
    """A form of checkpoint.

    Attributes:
        write: brings a rewritten model into it, given as ``write(model)``; one with `uniform` layers is told
            ``kernel_dims``, ``gguf`` and ``slot_values`` too. Raises UsageError where it cannot express the model.
        uniform: whether all layers have one size, and maps that are linear in the hidden states; it may then be
            compiled towards, with the sizes of engines' kernels, or be written as llama.cpp's converter reads it.
        named: whether its name is the ``model_type`` of a class of transformers.
        gates: trained gates that it holds, the first unless asked for another; None where none is asked about.
        sinks: sinks that it holds.
        own_head: whether a tied head is written out, but for vLLM, whose class ties it; a `uniform` one does so itself.
    """

    write: Callable[..., Native]
    uniform: bool = False
    named: bool = True
    gates: tuple[str, ...] | None = None
    sinks: tuple[str, ...] | None = None
    own_head: bool = False


def kind_with(profile: str) -> AttentionKind:
    """The kind of attention that a profile holds; not for "remote", which holds any."""
    return next(kind for kind in known_kinds() if profile in kind.profiles)


def find_profile(name: str) -> Profile | None:
    """The profile of a name; None for "remote"."""
    return None if name == REMOTE_PROFILE else cast(Profile, kind_with(name).profile(name))


def uniform_profiles() -> list[str]:
    """Names of those with one size for all layers."""
    return [name for kind in known_kinds() for name in kind.profiles if kind.profile(name).uniform]


def check_profile(option: str, name: str) -> None:
    """Refuse a profile that there is not, or whose class the installed transformers does not have.

    Raises:
        UsageError: it is one of these.
    """
    others = [other for kind in known_kinds() for other in kind.profiles]
    check_choice(option, name, dict.fromkeys([*PROFILES, *others]))
    profile = find_profile(name)
    if profile is not None and profile.named and name not in CONFIG_MAPPING:
        raise UsageError(
            f"{option} {name}: transformers {transformers.__version__} has no such class; upgrade it or choose another"
        )


def check_layers(model: PreTrainedModel, kind: AttentionKind, holder: str) -> None:
    """Refuse layers that are of another kind than the one that a form holds.

    Raises:
        UsageError: a layer is; it names layer, kind and what to do.
    """
    config: Any = model.config
    for name, found in kinds_in(config).items():
        if found is not kind:
            raise UsageError(f"{name} is {found.title}, which {holder} does not have; {OTHER}")
