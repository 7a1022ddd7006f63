"""Compile towards a profile: what its class lacks is left out of the model before anything is fitted or trained.

So what is trained is what the class computes, and `export` to that profile only renames. Norms and biases that
DeepSeek's attention does not have become linear maps; rotary slots get the frequencies of one plain table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from attnedit.compiler.capture.sites import AttentionSite
from attnedit.compiler.errors import UsageError
from attnedit.targets.attention.kind import AttentionKind
from attnedit.targets.runtime.engines import VLLM, check_engine, stock_rank
from attnedit.targets.runtime.hf.export import native_form, profile_of
from attnedit.targets.runtime.hf.latent import lacking, positions, slot_frequencies
from attnedit.targets.runtime.hf.mla import KERNEL_DIMS, Sizes, check_activation, latent_config
from attnedit.targets.runtime.hf.native import OTHER, check_places, refuse_half, skeleton
from attnedit.targets.runtime.hf.profiles import Profile, check_profile, find_profile, kind_with, uniform_profiles
from attnedit.targets.runtime.hf.rope import BY_LENGTH, flat_rope, plain_table

KERNEL_VALUES = KERNEL_DIMS["kv_lora_rank"] + KERNEL_DIMS["qk_rope_head_dim"]


@dataclass(frozen=True)
class Form:
    """What a profile asks of a model.

    Attributes:
        profile: its name.
        kernel_dims: whether sizes are those of engines' kernels.
        engine: that it is for.
    """

    profile: str
    kernel_dims: bool = False
    engine: str | None = None

    @property
    def kernel_slots(self) -> bool:
        """Whether the rotary slots are those of engines' kernels."""
        return self.kernel_dims or self.engine == VLLM

    @property
    def holds(self) -> Profile:
        """What the profile holds."""
        found = find_profile(self.profile)
        assert found is not None  # none asks for the remote one
        return found

    @property
    def asks(self) -> dict[str, str | None]:
        """Options that it sets, unless they are given."""
        return {"gate": next(iter(self.holds.gates or ()), None), "sinks": "none"}


def form_for(
    profile: str | None,
    kernel_dims: bool,
    target: str,
    kinds: Sequence[AttentionKind],
    kv_budget: float | None = None,
    gate: str | None = None,
    sinks: str | None = None,
    engine: str | None = None,
) -> Form | None:
    """Hold the options of a compilation, whose target makes these kinds of attention, against a profile.

    Returns:
        The form that the model gets; None where the profile asks for nothing: none is given, or one for any result.

    Raises:
        UsageError: there is no such profile or engine, or an argument contradicts it.
    """
    profile = check_engine(engine, target, kinds, profile, kernel_dims, gate, sinks)
    if profile is None:
        if kernel_dims:
            raise UsageError(f"kernel_dims goes with profile {' or '.join(uniform_profiles())}")
        return None
    check_profile("profile", profile)
    holds = find_profile(profile)
    if kernel_dims and not (holds is not None and holds.uniform):
        raise UsageError(f"kernel_dims goes with profile {' or '.join(uniform_profiles())}, not with {profile}")
    if holds is None:
        return None
    if [kind.name for kind in kinds] != [kind_with(profile).name]:
        raise UsageError(f"profile {profile} holds target {kind_with(profile).name}, not {target}; {OTHER}")
    if kernel_dims and kv_budget is not None:
        raise UsageError("kv_budget and kernel_dims both say how much is cached; give one of them")
    if None not in (gate, holds.gates) and gate not in (holds.gates or ()):
        raise UsageError(f"profile {profile} holds gate {' or '.join(holds.gates or ())}, not {gate}; {OTHER}")
    if None not in (sinks, holds.sinks) and sinks not in (holds.sinks or ()):
        raise UsageError(f"profile {profile} holds no sinks {sinks}; give sinks none")
    return Form(profile, kernel_dims, engine)


def check_source(model: PreTrainedModel, sites: list[AttentionSite], form: Form) -> list[str]:
    """Refuse a source that a profile with latent attention cannot stand for, before any work is done.

    Returns:
        What will be approximated, for the report.

    Raises:
        UsageError: the class lacks something that nothing could stand for; the message says what.
    """
    refuse_half(form.profile, model.dtype)
    facts: dict[str, None] = {}
    for site in sites:
        never, nearly = lacking(site, positions(model))
        if site.already_mla:
            never = ["latent attention already", *never]
        if never:
            raise UsageError(f"{site.name} has {never[0]}, which profile {form.profile} does not; {OTHER}")
        parts = (site.q_proj, site.k_proj, site.v_proj, site.o_proj)
        biases = ["biases"] if any(part is not None and part.bias is not None for part in parts) else []
        facts |= dict.fromkeys([*nearly, *biases])
    if form.kernel_dims:
        _check_kernel_sizes(model, sites)
    elif (kind := flat_rope(model.config).get("rope_type")) in BY_LENGTH:
        raise UsageError(f"rope_type {kind!r} changes with the length, and {form.profile} has one table; {OTHER}")
    # The rest of the model must have its places; how large the attention will be does not matter here.
    first = sites[0]
    sizes = Sizes(8, 2 * max(1, len(first.rotary_pairs)), first.head_dim, first.v_head_dim)
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    names = tuple(f"{site.name}." for site in sites)
    check_places(skeleton(latent_config(model.config, form.profile, sizes, rope)), model.state_dict(), names)
    return list(facts)


def _check_kernel_sizes(model: PreTrainedModel, sites: list[AttentionSite]) -> None:
    check_activation(model.config)
    for site in sites:
        for name, size in (("qk_nope_head_dim", site.head_dim), ("v_head_dim", site.v_head_dim)):
            if size > KERNEL_DIMS[name]:
                raise UsageError(f"kernel_dims has {name} {KERNEL_DIMS[name]}, and {site.name} needs {size}")
        values = site.num_key_value_heads * (site.head_dim + site.v_head_dim)
        if values <= KERNEL_VALUES:
            raise UsageError(
                f"{site.name} caches {values} values per token, and engines' kernels {KERNEL_VALUES}: nothing would be "
                "saved; leave kernel_dims out"
            )


@dataclass(frozen=True)
class ClassSizes:
    """What a class that has one size for all layers takes.

    Attributes:
        form: of the profile.
        columns: of cos and sin that rotary slots may have, fastest first, by the site's name.
        fold: how many of a site's frequencies share a slot where the sizes are fixed.
    """

    form: Form
    columns: Mapping[str, Sequence[int]]
    fold: int

    def rank(self, source_values: int, budget: float) -> int | None:
        """Size of the latent within a budget, a fraction of the source's values per token and layer; None for any.

        Raises:
            UsageError: the class has none within the budget.
        """
        if self.form.kernel_dims:
            return KERNEL_DIMS["kv_lora_rank"]
        return stock_rank(self.form.engine, source_values, budget)


def class_sizes(model: PreTrainedModel, sites: list[AttentionSite], form: Form) -> ClassSizes:
    """Say which sizes the class of a form takes for a source."""
    return ClassSizes(form, slot_columns(model, sites, form), kernel_fold(sites[0]))


def slot_columns(model: PreTrainedModel, sites: list[AttentionSite], form: Form) -> dict[str, list[int]]:
    """Columns of cos and sin that rotary slots may have, fastest first, by the site's name.

    Those of kernel sizes are what the kernels' plain table has of the source's frequencies.
    """
    theta = float(flat_rope(model.config).get("rope_theta") or 0)
    found = {}
    for site in sites:
        columns = list(site.rope.columns) if site.rope else []
        frequencies, _ = slot_frequencies(model, site, columns)
        pairs = sorted(zip(frequencies, columns, strict=True), reverse=True)
        if form.kernel_slots and theta:
            table = plain_table(theta, KERNEL_DIMS["qk_rope_head_dim"])
            pairs = [pair for pair in pairs[:: kernel_fold(site)] if table.places([pair[0]]) is not None]
        found[site.name] = [column for _, column in pairs]
    return found


def kernel_fold(site: AttentionSite) -> int:
    """How many of a site's frequencies share a slot of the kernels' table."""
    return max(1, len(site.rotary_pairs) // (KERNEL_DIMS["qk_rope_head_dim"] // 2))


@torch.no_grad()
def check_form(model: PreTrainedModel, form: Form) -> None:
    """Try the export of a rewritten model to a profile, writing nothing, so that a later export cannot be refused.

    Raises:
        UsageError: the profile cannot express the model; the message says what of it.
    """
    native = native_form(model, profile_of(model, form.engine, None) or form.profile, form.kernel_dims, form.engine)
    check_places(skeleton(native.config), native.state)
