"""Every causal language model of transformers through the compiler, and the tables of it in docs/families.md.

    python benchmarks/families.py --rows docs/data/families.json --output docs/families.md [--only llama,gptj]

Each class of ``AutoModelForCausalLM`` is built with a tiny random configuration, found by program: its defaults, with
every size that has a usual name made small. Models that take images or sound (``AutoModelForMultimodalLM``) are made
whole and run on text, so that what is converted is their text tower. Each runs in a process of its own with a time
limit. Rows are kept in a file as they are found, so that a survey that was stopped goes on; ``--only`` finds those
named again.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import resource
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from families_page import outcome, page
from rich.progress import track
from torch import Tensor
from transformers import AutoModelForMultimodalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
)

import attnedit
from attnedit.compiler.capture.capture import capture, captured_implementation, graph_module
from attnedit.compiler.capture.probe import sees_ahead
from attnedit.compiler.graph.anchor import attention_implementation
from attnedit.compiler.model_io.heads import LANGUAGE, auto_class, classes_of, is_multimodal
from attnedit.compiler.model_io.source_checks import check_config
from attnedit.targets.runtime.eager import share_copy, splice

SECONDS = 180
"""Time that one class may take."""

MEMORY = 12 * 2**30
"""Address space that one class may take."""

HIDDEN, HEADS, GROUPS, HEAD_DIM, LAYERS, VOCABULARY, POSITIONS = 32, 4, 2, 8, 2, 64, 128

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "word_embed_proj_dim", "embedding_size"), HIDDEN),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "decoder_ffn_dim", "dff"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "depth"), LAYERS),
    **{"encoder_layers": LAYERS, "encoder_attention_heads": HEADS, "encoder_ffn_dim": 48},
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), HEADS),
    "num_key_value_heads": GROUPS,
    "head_dim": HEAD_DIM,
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "max_seq_len", "context_length", "n_ctx", "max_target_positions"),
        POSITIONS,
    ),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "window_size"), 4),
    # mixtures of experts
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "num_experts_per_token"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    **{"n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1},
    # latent attention
    **{"q_lora_rank": 12, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8},
    # linear attention and state spaces
    **{"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    **{"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_num_heads": 8},
    **{"mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1, "mamba_dt_rank": 4},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    **{"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY},
    "tie_word_embeddings": False,
}

ALWAYS = (
    *("head_dim", "num_key_value_heads"),
    *("num_experts", "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size"),
)
"""Sizes that are given where a class's default is None, too."""

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_MROPE = {**_ROPE, "mrope_section": [2, 1, 1]}
_KINDS = ["sliding_attention", "full_attention"]

_BLT_PART = {
    **{"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": 1, "intermediate_size": 48},
    **{"num_attention_heads": HEADS, "num_key_value_heads": HEADS, "head_dim": HEAD_DIM},
}

SPECIAL: dict[str, dict[str, Any]] = {
    # what must agree with something else in a way no name tells
    "bailing_hybrid": {"n_group": 1, "topk_group": 1, "head_dim": 8},
    "bamba": {"attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 4},
    "blt": {
        "encoder_hash_byte_group_vocab": 64,
        "patcher_config": _BLT_PART,
        "encoder_config": {**_BLT_PART, "hidden_size_global": HIDDEN},
        "decoder_config": {**_BLT_PART, "hidden_size_global": HIDDEN},
        "global_config": _BLT_PART,
    },
    "bert-generation": {"is_decoder": True},
    "cohere_compass_text": {"layer_types": _KINDS, "rope_parameters": {kind: _ROPE for kind in _KINDS}},
    "dbrx": {
        "attn_config": {"kv_n_heads": GROUPS, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": HIDDEN, "ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3_text": {"query_pre_attn_scalar": 16},
    "gemma3n_text": {"num_hidden_layers": 6, "layer_types": 3 * _KINDS, "num_kv_shared_layers": 2},
    "gemma4_text": {"num_hidden_layers": 6, "layer_types": 3 * _KINDS, "num_kv_shared_layers": 2},
    "gemma4_unified_text": {"num_hidden_layers": 6, "layer_types": 3 * _KINDS, "num_kv_shared_layers": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "zaya": {"num_experts_per_tok": 1},
    "qwen4_exp_text": {
        **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8},
        **{"indexer_budget": 8, "indexer_compress_ratio": 4},
    },
    "reformer": {"axial_pos_embds": False},
    # its own cache drops what is beyond this, its masks do not
    "moshi": {"sliding_window": POSITIONS},
    "xmod": {"default_language": "en_XX"},
    **{name: {"rope_parameters": _MROPE} for name in ("qwen2_vl_text", "qwen2_5_vl_text", "paddleocr_vl_text")},
    **{name: {"rope_parameters": _MROPE} for name in ("glm4v_text", "glm4v_moe_text", "glm_ocr_text")},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"]},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
}


REQUIRED: dict[str, dict[str, Any]] = {
    # what a class cannot do without, since its own defaults contradict each other
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
}


def tiny(config_class: type[PreTrainedConfig]) -> PreTrainedConfig:
    """Make a small configuration: the class's defaults with `SIZES` where it has such a field."""
    defaults = config_class(**REQUIRED.get(config_class.model_type, {}))
    fields = vars(defaults)
    known = {name: size for name, size in SIZES.items() if name in fields and name not in defaults.attribute_map}
    # None mostly means: follows from the others, as they are.
    known = {name: size for name, size in known.items() if fields[name] is not None or name in ALWAYS}
    if "kv_lora_rank" in known:
        known["num_key_value_heads"], known["head_dim"] = HEADS, SIZES["qk_rope_head_dim"]
    if config_class.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        known["is_decoder"] = True
    kinds = fields.get("layer_types")
    if isinstance(kinds, list):
        kinds = sorted(set(kinds), key=kinds.index)
        known["layer_types"] = (kinds * LAYERS)[:LAYERS] if len(kinds) <= LAYERS else kinds
        known["num_hidden_layers"] = len(known["layer_types"])
    parts = {name: getattr(defaults, name, None) for name in config_class.sub_configs}
    small = {name: tiny(type(part)) for name, part in parts.items() if isinstance(part, PreTrainedConfig)}
    return config_class(**{**known, **small, **SPECIAL.get(config_class.model_type, {})})


def randomise(model: PreTrainedModel) -> PreTrainedModel:
    """Give a model weights large enough that attention matters."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point():
                continue
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits without a cache."""
    with torch.no_grad():
        result: Tensor = model(ids, use_cache=False).logits
    return result


def generates(model: PreTrainedModel) -> str:
    """Generate for a padded batch from the cache."""
    ids = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    call: Any = model.generate
    out = call(ids, attention_mask=mask, min_new_tokens=4, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert out.shape == (2, 9)
    return "yes"


def examine(config_class: type[PreTrainedConfig]) -> Iterator[tuple[str, str]]:
    """Yield one column of the table after another."""
    defaults = config_class(**REQUIRED.get(config_class.model_type, {}))
    if is_multimodal(defaults):
        check_config(defaults, config_class.model_type)
    config = tiny(config_class)
    model = randomise(auto_class(config).from_config(config))
    yield "parameters", str(sum(parameter.numel() for parameter in model.parameters()))
    ids = torch.randint(3, VOCABULARY, (1, 24), generator=torch.Generator().manual_seed(1))
    sites = capture(model)
    latent = [site for site in sites if site.already_mla]
    yield "sites", f"{len(sites)}" + (f", {len(latent)} latent already" if latent else "")
    with attention_implementation(model, captured_implementation(sites) or "eager"):
        expected = logits(model, ids)
        copy = share_copy(model)
        splice(copy, {site.name: graph_module(model, site) for site in sites})
        error = float((logits(copy, ids) - expected).abs().max())
    yield "identity", "exact" if error == 0 else f"{error:.0e}"
    data = torch.randint(3, VOCABULARY, (32, 64), generator=torch.Generator().manual_seed(2))
    options: dict[str, Any] = {"calibration": data}
    unread = sum(site.unread_rope is not None for site in sites)
    if unread:
        yield "note", f"positions stay in the keys of {unread} layers"
    if len(latent) < len(sites):
        # Tracing takes most of the time, and finds the same each time.
        mock.patch.object(importlib.import_module("attnedit._live"), "capture", return_value=sites).start()
        done = attnedit.compile(model, "mla", kv_budget=1.0, **options)
        full = done.model
        for note in done.report.notes:
            if "own decoding" in note:
                yield "note", note
        expected = logits(model, ids)
        yield "MLA 1", f"{float((logits(full, ids) - expected).abs().max() / expected.abs().max()):.0e}"
        yield "MLA 1/2", generates(attnedit.compile(model, "mla", kv_budget=0.5, alternations=0, **options).model)
        if sees_ahead(model):
            yield "GateSWA", "no"
            yield "note", "tokens of an image see each other both ways, which no window does"
            return
        windowed = attnedit.compile(model, "gateswa", window=4, full_layers=0, **options).model
        yield "GateSWA", generates(windowed)


def work(config_class: type[PreTrainedConfig], connection: Any) -> None:
    """Examine one class, and send what was found."""
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))  # some configurations stay large
    found: dict[str, str] = {}
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    warnings.simplefilter("ignore")
    try:
        for column, value in examine(config_class):
            found[column] = value
    except attnedit.AttneditError as error:
        found["refused"] = str(error)
    except BaseException as error:
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        found["fails"] = f"{type(error).__name__}: {said}"
    connection.send(found)


def survey(config_class: type[PreTrainedConfig]) -> dict[str, str]:
    """Examine one class in a process of its own."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=work, args=(config_class, theirs))
    process.start()
    theirs.close()
    try:
        found: dict[str, str] = ours.recv() if ours.poll(SECONDS) else {"fails": f"longer than {SECONDS} s"}
    except EOFError:
        found = {"fails": "the process died"}
    process.kill()
    process.join()
    return found


def classes() -> dict[str, type[PreTrainedConfig]]:
    """Configuration class of every causal language model and every model with a text tower, by model type."""
    mappings = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING)
    return {config_class.model_type: config_class for mapping in mappings for config_class in mapping}


def is_whole(config_class: type[PreTrainedConfig]) -> bool:
    """Whether models of a configuration are more than language models."""
    try:
        return auto_class(config_class(**REQUIRED.get(config_class.model_type, {}))) is AutoModelForMultimodalLM
    except (ValueError, TypeError, AttributeError):  # no defaults: it takes sub-configurations
        return config_class in MODEL_FOR_MULTIMODAL_LM_MAPPING


def main() -> None:
    """Examine all classes and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="model types, with commas between")
    parser.add_argument("--rows", type=Path, help="file that keeps what was found, as JSON")
    parser.add_argument("--output", type=Path, help="where to write the page; standard output unless given")
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    chosen = classes()
    kept: dict[str, dict[str, str]] = {}
    if options.rows is not None and options.rows.exists():
        kept = json.loads(options.rows.read_text(encoding="utf-8"))
    wanted = options.only.split(",") if options.only else [name for name in chosen if name not in kept]
    for model_type in track(wanted, "families", disable=options.output is None):
        row = kept[model_type] = survey(chosen[model_type])
        print(f"{model_type}: {outcome(row)}; {row.get('refused') or row.get('fails') or row}", file=sys.stderr)
        if options.rows is not None:
            options.rows.write_text(json.dumps(kept, indent=1), encoding="utf-8")
    tables: tuple[dict[str, dict[str, str]], ...] = ({}, {})
    for name, config_class in chosen.items():
        if name in kept:
            known = classes_of(LANGUAGE, config_class)
            kind = known[0] if (several := is_whole(config_class)) else known[-1]
            tables[several][f"{kind.__name__} (`{name}`)"] = kept[name]
    text = page(*tables)
    if options.output is None:
        print(text)
    else:
        options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
