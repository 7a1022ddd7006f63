"""Tiny models of several families with latent attention put in, exact or random: shared by the tests of eager."""

import functools
import itertools
from collections.abc import Callable

import families
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    set_seed,
)

from attnedit.compiler.capture.capture import capture
from attnedit.compiler.capture.sites import AttentionSite
from attnedit.targets.attention import MLA, MLAConfig
from attnedit.targets.attention.mla.graph import mla_graph
from attnedit.targets.runtime.eager import share_copy, splice, to_attnedit

torch.set_num_threads(1)
SIZES = {**families.SIZES, "initializer_range": 0.2, "eos_token_id": None}
FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=12),
    "gemma3": lambda: Gemma3TextConfig(
        **{**SIZES, "num_hidden_layers": 3},
        head_dim=8,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "gpt_oss": lambda: GptOssConfig(
        **SIZES,
        head_dim=8,
        num_local_experts=2,
        num_experts_per_tok=1,
        sliding_window=6,
        layer_types=["full_attention", "sliding_attention"],
    ),
    "phi": lambda: PhiConfig(**SIZES),
}


@functools.cache
def source(family: str) -> tuple[PreTrainedModel, tuple[AttentionSite, ...]]:
    """The source model and its full-attention sites; nobody may change it."""
    set_seed(1)
    model = AutoModelForCausalLM.from_config(FAMILIES[family]()).eval()
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith(("bias", "sinks")):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model, tuple(site for site in capture(model) if site.window is None)


def exact_shape(site: AttentionSite) -> tuple[list[tuple[int, int]], list[int], list[int]]:
    """Rotary pairs, their columns, and the dims that pass rope by."""
    pairs = list(site.rope.pairs) if site.rope else []
    turned = set(itertools.chain.from_iterable(pairs))
    return pairs, list(site.rope.columns) if site.rope else [], [i for i in range(site.head_dim) if i not in turned]


def exact_config(site: AttentionSite) -> MLAConfig:
    _, columns, rest = exact_shape(site)
    groups = site.num_key_value_heads
    return MLAConfig(
        layer_idx=site.layer_idx,
        num_attention_heads=site.num_attention_heads,
        head_dim=site.head_dim,
        v_head_dim=site.v_head_dim,
        kv_lora_rank=groups * (site.v_head_dim + len(rest)),
        rope_columns=tuple(columns * groups),
        qk_nope_head_dim=site.head_dim if rest else 0,
        input_size=groups * (site.head_dim + site.v_head_dim),
        scale=site.scale,
        softcap=site.softcap,
        sinks=site.sinks is not None,
    )


@torch.no_grad()
def fill_exact(mla: MLA, model: nn.Module, site: AttentionSite) -> None:
    """Every rotary component its own slot; the latent is the values and what has no rotation."""
    pairs, _, rest = exact_shape(site)
    groups, d, dv = site.num_key_value_heads, site.head_dim, site.v_head_dim
    per_group = site.num_attention_heads // groups
    config, rank, slots = mla.config, mla.config.kv_lora_rank, mla.config.num_slots
    down, up, rope = mla.kv_a_proj_with_mqa.weight.zero_(), mla.kv_b_proj.weight.zero_(), mla.q_rope_proj.zero_()
    up = up.view(site.num_attention_heads, config.qk_nope_head_dim + dv, rank)
    for g in range(groups):
        down[g * dv : (g + 1) * dv, groups * d + g * dv : groups * d + (g + 1) * dv] = torch.eye(dv)
        for h in range(g * per_group, (g + 1) * per_group):
            up[h, config.qk_nope_head_dim :, g * dv : (g + 1) * dv] = torch.eye(dv)
        for i, dim in enumerate(rest):
            row = groups * dv + g * len(rest) + i
            down[row, g * d + dim] = 1
            up[g * per_group : (g + 1) * per_group, dim, row] = 1
        for i, (real, imaginary) in enumerate(pairs):
            slot = g * len(pairs) + i
            down[rank + slot, g * d + real] = down[rank + slots + slot, g * d + imaginary] = 1
            rope[g * per_group : (g + 1) * per_group, slot, real] = 1
            rope[g * per_group : (g + 1) * per_group, slots + slot, imaginary] = 1
    if mla.sinks is not None:
        mla.sinks.copy_(model.get_parameter(f"{site.name}.{site.sinks}"))


def random_config(site: AttentionSite, folded: bool = False) -> MLAConfig:
    values = exact_config(site).to_dict()
    return MLAConfig(
        **{
            **values,
            "kv_lora_rank": 10,
            "rope_columns": site.rope.columns[::2],
            "qk_nope_head_dim": site.head_dim,
            "folded": folded,
            "kv_bias": folded,
            "input_size": SIZES["hidden_size"] if folded else values["input_size"],
        }
    )


def rewrite(family: str, exact: bool = False, folded: bool = False) -> tuple[PreTrainedModel, dict[str, MLAConfig]]:
    model, sites = source(family)
    student = share_copy(model)
    configs = {site.name: exact_config(site) if exact else random_config(site, folded) for site in sites}
    graphs = {site.name: mla_graph(student, site, configs[site.name]) for site in sites}
    torch.manual_seed(2)
    for site in sites:
        mla = graphs[site.name].get_submodule("mla")
        if exact:
            fill_exact(mla, model, site)
        else:
            for parameter in mla.parameters():
                nn.init.normal_(parameter, std=0.3)
    splice(student, graphs)
    return to_attnedit(student, configs), configs


@functools.cache
def shared_rewrite(family: str) -> PreTrainedModel:
    """A rewritten model with random latent attention for tests that only read it."""
    return rewrite(family)[0]


def batch() -> dict[str, Tensor]:
    """Two sequences, the first with left padding."""
    ids = torch.randint(3, 64, (2, 11), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    ids[0, :4], mask[0, :4] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def assert_close(actual: Tensor, expected: Tensor, mask: Tensor | None = None) -> None:
    """Within 1e-4 of the largest logit, where ``mask`` is set."""
    if mask is not None:
        actual, expected = actual[mask.bool()], expected[mask.bool()]
    assert (actual - expected).abs().max() < 1e-4 * expected.abs().max()
