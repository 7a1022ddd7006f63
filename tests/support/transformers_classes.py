"""Checks of `tests/test_modeling_common.py`: what a class is, embeddings, offloading, plans, conversions, rope."""

from __future__ import annotations

import copy
import inspect
import re
import tempfile
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers_checks import VOCABULARY, DoesNotApply, Subject, check, inputs
from transformers_loading import same_weights, saved


@check
def base_model_prefix_loads_base_weights(subject: Subject) -> None:
    model = subject.model()
    with tempfile.TemporaryDirectory() as directory:
        saved(model.base_model, directory)
        again, info = subject.kind.from_pretrained(directory, output_loading_info=True)
    same_weights(model.base_model.state_dict(), again.base_model.state_dict())
    assert all(not name.startswith(f"{model.base_model_prefix}.") for name in info["missing_keys"])


@check
def model_base_model_prefix(subject: Subject) -> None:
    model = subject.model()
    assert model.base_model is not model


@check
def model_main_input_name(subject: Subject) -> None:
    assert subject.kind.main_input_name == list(inspect.signature(subject.kind.forward).parameters)[1]


@check
def model_get_set_embeddings(subject: Subject) -> None:
    model = subject.model()
    assert isinstance(model.get_input_embeddings(), nn.Embedding)
    other = nn.Embedding(10, 10)
    model.set_input_embeddings(other)
    assert model.get_input_embeddings() is other
    assert isinstance(model.get_output_embeddings(), nn.Linear)


@check
def resize_tokens_embeddings(subject: Subject) -> None:
    model = subject.model()
    first = model.get_input_embeddings().weight.detach().clone()
    for size in (VOCABULARY + 10, VOCABULARY - 15):
        embedding = model.resize_token_embeddings(size)
        assert type(embedding) is nn.Embedding or type(embedding) is type(subject.made.get_input_embeddings())
        assert embedding.weight.shape[0] == size == model.config.vocab_size
        given = {**inputs(), "input_ids": inputs()["input_ids"].clamp(max=size - 1)}
        given["input_ids"][:, -2] = size - 1
        assert model(**given).logits.shape[-1] == size
        if size > VOCABULARY:
            parts = embedding.weight[:VOCABULARY].mean(0), embedding.weight[VOCABULARY:].mean(0)
            torch.testing.assert_close(*parts, rtol=1e-3, atol=1e-3)
    assert torch.equal(first[: VOCABULARY - 15], model.get_input_embeddings().weight)
    assert model.resize_token_embeddings(VOCABULARY, pad_to_multiple_of=64).weight.shape[0] % 64 == 0
    with pytest.raises(ValueError, match="not and integer"):
        model.resize_token_embeddings(VOCABULARY, pad_to_multiple_of=1.3)


@check
def resize_embeddings_untied(subject: Subject) -> None:
    config = subject.config
    config.tie_word_embeddings = False
    model = subject.new(config)
    for size in (VOCABULARY + 10, VOCABULARY - 15):
        model.resize_token_embeddings(size)
        assert model.get_output_embeddings().weight.shape[0] == size == model.config.vocab_size
        model(**{**inputs(), "input_ids": inputs()["input_ids"].clamp(max=size - 1)})


@check
def resize_embeddings_untied_no_reinit_on_post_init(subject: Subject) -> None:
    config = subject.config
    config.tie_word_embeddings = False
    model = subject.new(config)
    model.resize_token_embeddings(VOCABULARY + 10)
    before = model.get_output_embeddings().weight.detach().clone()
    model.post_init()
    assert torch.equal(before, model.get_output_embeddings().weight)


@check
def disk_offload_safetensors(subject: Subject) -> None:
    """Theirs asks for an accelerator; here one layer is on disk and the rest in memory."""
    model = subject.model()
    devices = {name: "cpu" for name in ("model.embed_tokens", "model.layers.0", "model.norm", "lm_head")}
    devices |= {"model.rotary_emb": "cpu", "model.layers.1": "disk"}
    with tempfile.TemporaryDirectory() as directory, torch.no_grad():
        saved(model, directory)
        again = subject.kind.from_pretrained(directory, device_map=devices, offload_folder=f"{directory}/offload")
        assert all(value.is_meta for value in again.model.layers[1].parameters())
        torch.testing.assert_close(again(**inputs()).logits, model(**inputs()).logits, **subject.tolerance)


@check
def bc_torch_dtype(subject: Subject) -> None:
    with tempfile.TemporaryDirectory() as directory:
        saved(subject.model(), directory)
        for dtype in ("float16", "bfloat16", "float32", "auto", torch.float16, torch.bfloat16):
            old = subject.kind.from_pretrained(directory, torch_dtype=dtype)
            same_weights(old.state_dict(), subject.kind.from_pretrained(directory, dtype=dtype).state_dict())


@check
def config_attn_implementation_setter(subject: Subject) -> None:
    values = subject.config.to_diff_dict()
    for name in ("_attn_implementation_internal", "_attn_implementation"):
        values.pop(name, None)
    config = type(subject.config)(**values, attn_implementation="eager")
    assert config._attn_implementation == "eager"
    for implementation in ("sdpa", "eager"):
        config._attn_implementation = implementation
        assert config._attn_implementation == implementation


@check
def tp_plan_matches_params(subject: Subject) -> None:
    config = subject.config
    if config.base_model_tp_plan is None:
        raise DoesNotApply("no tensor-parallel plan")
    config.mlp_only_layers = [0]  # plans of experts name dense layers too
    model = subject.new(config)
    assert model.tp_plan
    names = {name for name, _ in [*model.named_parameters(), *model.named_modules()]}
    general = {re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names}
    unused = [entry for entry in model.tp_plan if entry not in general]
    assert not unused, f"entries of the plan that nothing has: {unused}"


@check
def tied_head_has_a_tp_plan_entry(subject: Subject) -> None:
    if subject.config.base_model_tp_plan is None:
        raise DoesNotApply("no tensor-parallel plan")
    assert "lm_head" in subject.model().tp_plan


def conversions(model: Any) -> list[Any]:
    found = get_model_conversion_mapping(model, add_legacy=False)
    if not found:
        raise DoesNotApply("weights are stored as they are")
    return list(found)


@check
def reverse_loading_mapping(subject: Subject) -> None:
    """Weights are stored in the source's form, and a loaded model stores what a built one does."""
    model = subject.new()
    mapped = conversions(model)
    with tempfile.TemporaryDirectory() as directory:
        first = load_file(saved(model, directory) / "model.safetensors")
        assert sorted(first) != sorted(model.state_dict())
        for conversion in mapped:
            for pattern in conversion.source_patterns:
                wanted = re.compile(pattern.replace("*", r"\d+") if "\\" not in pattern else pattern)
                assert any(wanted.search(name) for name in first), pattern
        again = subject.kind.from_pretrained(directory)
        same_weights(again.state_dict(), model.state_dict())
        same_weights(load_file(saved(again, directory) / "model.safetensors"), first)


@check
def can_load_from_already_mapped_keys(subject: Subject) -> None:
    model = subject.new()
    conversions(model)
    with tempfile.TemporaryDirectory() as directory:
        place = saved(model, directory, save_original_format=False)
        same_weights(subject.kind.from_pretrained(place).state_dict(), model.state_dict())


@check
def model_forward_default_config_values(subject: Subject) -> None:
    values = subject.config.to_diff_dict()
    for name in ("pad_token_id", "eos_token_id", "bos_token_id", "sep_token_id", "tie_word_embeddings"):
        values.pop(name, None)
    config = type(subject.config)(**values)
    config.pad_token_id = config.eos_token_id = config.bos_token_id = 0
    subject.new(config)(**inputs())


@check
def sdpa_can_dispatch_non_composite_models(subject: Subject) -> None:
    if not subject.kind._supports_sdpa:
        raise DoesNotApply("the class does not take SDPA")
    with tempfile.TemporaryDirectory() as directory:
        saved(subject.model(), directory)
        assert subject.kind.from_pretrained(directory).config._attn_implementation == "sdpa"
        model = subject.kind.from_pretrained(directory, attn_implementation="eager")
        assert model.config._attn_implementation == "eager"
        model(**inputs())


@check
def can_set_attention_dynamically(subject: Subject) -> None:
    model = subject.model("eager")
    if not subject.kind._supports_sdpa:
        raise DoesNotApply("the class does not take SDPA")
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match='`attn_implementation="foo"` is not supported'):
        model.set_attn_implementation("foo")
    assert model.config._attn_implementation == model.base_model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"


@check
def model_is_small(subject: Subject) -> None:
    assert sum(parameter.numel() for parameter in subject.made.parameters()) < 1_000_000


ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 10.0, "rope_theta": 10000.0},
    "dynamic": {"rope_type": "dynamic", "factor": 10.0, "rope_theta": 10000.0},
    "yarn": {"rope_type": "yarn", "factor": 10.0, "rope_theta": 10000.0, "original_max_position_embeddings": 128},
}


def with_rope(config: Any, values: dict[str, Any]) -> Any:
    result = copy.deepcopy(config)
    rope = result.rope_parameters
    nested = any(isinstance(value, dict) for value in rope.values())
    result.rope_parameters = {name: dict(values) for name in rope} if nested else dict(values)
    return result


@check
def model_rope_scaling_from_config(subject: Subject) -> None:
    """Configurations say how positions are scaled: one that says otherwise gives other numbers."""
    short, long = ({"input_ids": inputs()["input_ids"][:1].repeat(1, times)[:, :length]} for times, length in SIZES)
    plain = subject.new(with_rope(subject.config, {"rope_type": "default", "rope_theta": 10000.0}))
    for kind, values in ROPES.items():
        scaled = subject.new(with_rope(subject.config, values))
        scaled.load_state_dict(plain.state_dict())
        with torch.no_grad():
            same = torch.allclose(plain(**short).logits, scaled(**short).logits, atol=1e-5)
            assert same == (kind == "dynamic"), kind
            assert not torch.allclose(plain(**long).logits, scaled(**long).logits, atol=1e-5), kind


SIZES = ((2, 10), (28, 192))
