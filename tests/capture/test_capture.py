"""Capture held to every family of the table: counts, facts, and logits of the graphs put back into the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import pytest
import torch
from accelerate import init_empty_weights
from families import FAMILIES, SUPPORTED, UNSUPPORTED, build, shared
from torch import nn
from transformers import MambaConfig, MambaForCausalLM, PreTrainedModel, T5Config, T5ForConditionalGeneration
from vision_models import build_vision

from attnedit.compiler.capture.capture import (
    as_captured,
    capture,
    capture_model,
    captured_implementation,
    graph_module,
)
from attnedit.compiler.capture.rope import rope_angles
from attnedit.compiler.capture.sites import AttentionSite
from attnedit.compiler.compatibility.caches import cache_parameter
from attnedit.compiler.errors import CaptureError, UsageError
from attnedit.compiler.graph.anchor import ANCHOR, attention, attention_implementation, reference_attention
from attnedit.compiler.graph.dataflow import anchors


@cache
def sites_of(name: str) -> list[AttentionSite]:
    return capture(shared(name))


def batch() -> dict[str, torch.Tensor]:
    """Another batch and length than the probe's, with left padding."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 60, (3, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    mask[2, :1] = 0
    return {"input_ids": ids, "attention_mask": mask}


@contextmanager
def replaced(model: PreTrainedModel, sites: list[AttentionSite]) -> Iterator[None]:
    originals = {site.name: model.get_submodule(site.name) for site in sites}
    try:
        for site in sites:
            model.set_submodule(site.name, graph_module(model, site))
        with as_captured(model, sites):
            yield
    finally:
        for name, module in originals.items():
            model.set_submodule(name, module)


def logits(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        result = model(**inputs, use_cache=False).logits
    assert isinstance(result, torch.Tensor)
    return result[inputs["attention_mask"].bool()]


@pytest.mark.parametrize("name", SUPPORTED)
def test_one_site_per_attention_layer(name: str) -> None:
    family, sites = FAMILIES[name], sites_of(name)
    assert len(sites) == family.attention_layers
    assert len({site.kind for site in sites}) == family.kinds
    assert len({id(site.graph) for site in sites}) == family.kinds
    assert [site.layer_idx for site in sites] == sorted({site.layer_idx for site in sites})


@pytest.mark.parametrize("name", SUPPORTED)
def test_graphs_put_back_give_the_same_logits(name: str) -> None:
    model, sites, inputs = shared(name), sites_of(name), batch()
    before, keys = logits(model, inputs), set(model.state_dict())
    with replaced(model, sites):
        after = logits(model, inputs)
        assert set(model.state_dict()) == keys
        for site in sites:
            assert len(anchors(model.get_submodule(site.name).graph)) == 1
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5 * float(before.abs().max()))
    with attention_implementation(model, captured_implementation(sites) or "eager"):
        exact = logits(model, inputs)
        # Attention that is written out scales and adds in an order of its own.
        atol = 1e-6 if FAMILIES[name].interface else 1e-6 * float(exact.abs().max())
        with replaced(model, sites):
            torch.testing.assert_close(logits(model, inputs), exact, rtol=0, atol=atol)


@pytest.mark.parametrize("name", SUPPORTED)
def test_facts_are_those_of_the_configuration(name: str) -> None:
    family, sites, config = FAMILIES[name], sites_of(name), shared(name).config
    scaling = getattr(config, "attention_multiplier", None)
    for site, rotary, window in zip(sites, family.rotary_dims, family.windows, strict=True):
        assert (site.num_attention_heads, site.num_key_value_heads) == family.heads
        assert site.head_dim == family.head_dim
        assert site.v_head_dim == (8 if family.mla else family.head_dim)
        assert site.window == window
        assert site.already_mla is family.mla
        assert site.output_gate is family.gate
        assert site.softcap == getattr(config, "attn_logit_softcapping", None)
        assert (site.sinks is not None) == (name == "gpt_oss")
        if scaling is not None:
            assert site.scale == pytest.approx(scaling)
        assert (site.unread_rope is not None) is family.unread
        if family.mla or family.unread:
            assert site.rope is None
            continue
        assert site.key_norm == site.query_norm == family.qk_norm
        assert site.linear_kv is (family.qk_norm is None)
        assert site.q_proj is not None
        assert site.k_proj is not None
        assert site.v_proj is not None
        assert (site.k_proj.bias is not None) is family.bias
        assert (site.k_proj.module == site.v_proj.module) is family.fused
        assert (site.k_proj.rows is not None) is family.fused
        assert (0 if site.rope is None else 2 * len(site.rope.pairs)) == rotary
        if site.rope is not None:
            assert site.rope.style == ("interleaved" if family.interleaved else "half")


@pytest.mark.parametrize("name", SUPPORTED)
def test_projections_rebuild_queries_keys_and_values(name: str) -> None:
    """Weights and rows named by the facts give the very nodes the facts name."""
    if FAMILIES[name].mla or FAMILIES[name].unread:
        pytest.skip("no such projections are read")
    model, site = shared(name), sites_of(name)[0]
    module = model.get_submodule(site.name)
    hidden = torch.randn(2, 5, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    for projection, node, norm in (
        (site.q_proj, site.query, site.query_norm),
        (site.k_proj, site.key, site.key_norm),
        (site.v_proj, site.value, None),
    ):
        assert projection is not None
        if norm is not None:
            continue
        child = module.get_submodule(projection.module)
        with torch.no_grad():
            output = child(hidden)
        rows = list(range(output.shape[-1])) if projection.rows is None else list(projection.rows)
        heads = site.num_attention_heads if node == site.query else site.num_key_value_heads
        expected = projection.scale * output[..., rows].unflatten(-1, (heads, -1)).transpose(1, 2)
        found = run_to(model, site, node, hidden)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def run_to(model: PreTrainedModel, site: AttentionSite, name: str, hidden: torch.Tensor) -> torch.Tensor:
    graph = graph_module(model, site)
    node = next(n for n in graph.graph.nodes if n.name == name)
    output = next(n for n in graph.graph.nodes if n.op == "output")
    output.args = (node,)
    graph.graph.eliminate_dead_code(lambda n: n.op in ("placeholder", "output"))
    graph.recompile()
    placeholders = [n.target for n in graph.graph.nodes if n.op == "placeholder" and not n.target.startswith("*")]
    with torch.no_grad():
        result = graph(**{**dict.fromkeys(placeholders), site.hidden: hidden})
    assert isinstance(result, torch.Tensor)
    return result


@pytest.mark.parametrize("name", ["qwen3", "gpt_oss", "cohere"])
def test_graphs_follow_the_dtype_of_the_model(name: str) -> None:
    """Captured in float32, moved to bfloat16 with the model, they still compute what the source computes."""
    model, inputs = build(name), batch()
    sites = capture(model)
    model.to(torch.bfloat16)
    with attention_implementation(model, "eager"):
        before = logits(model, inputs)
        with replaced(model, sites):
            after = logits(model, inputs)
    assert after.dtype == torch.bfloat16
    # gpt-oss takes its softmax in bfloat16, the anchor in float32.
    atol = 0.1 if name == "gpt_oss" else 0.0
    torch.testing.assert_close(after, before, rtol=0, atol=atol)


def test_site_graphs_have_the_signature_of_their_module() -> None:
    model = shared("qwen3")
    module = graph_module(model, sites_of("qwen3")[1])
    assert module.layer_idx == 1
    assert anchors(module.graph)[0].args[8] == 1
    cache = cache_parameter(model.get_submodule("model.layers.1.self_attn"))
    assert f"hidden_states, position_embeddings, attention_mask, {cache} = None, **kwargs" in module.code
    called = [node.target for node in module.graph.nodes if node.op == "call_module"]
    assert sorted(called) == ["k_norm", "k_proj", "o_proj", "q_norm", "q_proj", "v_proj"]
    assert module.q_proj is model.get_submodule("model.layers.1.self_attn.q_proj")


def test_capture_leaves_the_model_as_it_was() -> None:
    model = build("llama")
    model.train()
    implementation = model.config._attn_implementation
    capture(model)
    assert model.config._attn_implementation == implementation
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_meta_models_capture_like_real_ones(name: str) -> None:
    real_model = shared(name)
    with torch.device("meta"):
        model = type(real_model)(real_model.config)
    for found, expected in zip(capture(model), sites_of(name), strict=True):
        assert found.structure == expected.structure
        assert found.rope == expected.rope
        angles, real = rope_angles(model, found), rope_angles(shared(name), expected)
        assert angles is not None
        assert real is not None
        torch.testing.assert_close(angles[0], real[0], rtol=0, atol=0)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_attention_that_cannot_be_converted_is_refused(name: str) -> None:
    reason = {
        "openai-gpt": r"_softmax and does not go through transformers' attention interface, and no module around it",
        "diffllama": "it runs attention more than once",
    }
    with pytest.raises(CaptureError, match=reason[name]) as error:
        capture(shared(name))
    assert error.value.exit_code == 2
    assert "\n" not in str(error.value)
    assert "Attention)" in str(error.value)


def test_model_without_attention_is_refused() -> None:
    model = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=1))
    with pytest.raises(CaptureError, match="no attention site"):
        capture(model)


def test_encoder_decoder_is_refused() -> None:
    model = T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2))
    with pytest.raises(CaptureError, match="encoder-decoder"):
        capture(model)


def test_of_a_model_with_images_the_text_tower_is_captured() -> None:
    with init_empty_weights(include_buffers=False):
        model = build_vision("llava")
    assert [site.name for site in capture(model)] == [f"model.language_model.layers.{i}.self_attn" for i in range(3)]


def test_a_plain_module_is_no_model() -> None:
    with pytest.raises(UsageError, match="Linear is not a transformers model"):
        capture(nn.Linear(2, 2))


def test_attention_that_its_arguments_do_not_describe_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A family whose eager function does more than the interface is told."""
    from transformers.models.llama import modeling_llama

    eager = modeling_llama.eager_attention_forward

    def louder(*args: object, **kwargs: object) -> tuple[torch.Tensor, torch.Tensor]:
        output, weights = eager(*args, **kwargs)
        return output * 2, weights

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", louder)
    with pytest.raises(CaptureError, match="does not compute what its eager attention computes"):
        capture(shared("llama"))


@pytest.mark.parametrize("name", ["qwen3", "gpt_oss", "gpt2"])
def test_the_whole_model_is_one_graph(name: str) -> None:
    model, inputs = shared(name), batch()
    graph = capture_model(model)
    assert len(anchors(graph.graph)) == FAMILIES[name].attention_layers
    assert set(graph.state_dict()) <= set(model.state_dict())
    with torch.no_grad():
        found = graph(inputs["input_ids"], inputs["attention_mask"])[inputs["attention_mask"].bool()]
    expected = logits(model, inputs)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_the_whole_model_is_traced_through_replaced_attention() -> None:
    model, inputs = shared("llama"), batch()
    with replaced(model, sites_of("llama")):
        graph = capture_model(model)
        expected = logits(model, inputs)
    with torch.no_grad():
        found = graph(inputs["input_ids"], inputs["attention_mask"])[inputs["attention_mask"].bool()]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_anchor_op_is_a_well_behaved_operator() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 5, 4, generator=generator, requires_grad=True) for heads in (4, 2, 2))
    mask = torch.zeros(2, 1, 5, 5)
    sinks = torch.randn(4, generator=generator, requires_grad=True)
    torch.library.opcheck(attention, (q, k, v, mask, 0.5, 3.0, sinks, None, 0))
    torch.library.opcheck(attention, (q, k, v, None, 0.5, None, None, 2, 0))


def test_anchor_gradients_are_those_of_eager_attention() -> None:
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    tensors = [make(1, 2, 3, 4), make(1, 1, 3, 4), make(1, 1, 3, 4), make(2)]

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
        result = attention(q, k, v, None, 0.5, 2.0, sinks, None, 0)
        assert isinstance(result, torch.Tensor)
        return result

    assert torch.autograd.gradcheck(run, tensors)


@pytest.mark.parametrize("window", [None, 2])
def test_masks_of_all_kinds_agree(window: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 4, 8, generator=generator) for heads in (4, 2, 2))
    distance = torch.arange(4)[:, None] - torch.arange(4)[None, :]
    boolean = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
    additive = torch.zeros(4, 4).masked_fill(~boolean, torch.finfo(torch.float32).min)
    none = reference_attention(q, k, v, None, 0.3, window=window)
    for mask in (boolean[None, None], additive[None, None], torch.ones(2, 4)):
        torch.testing.assert_close(reference_attention(q, k, v, mask, 0.3, window=window), none)


def test_attention_implementation_is_restored_after_an_error() -> None:
    model = shared("llama")
    before = model.config._attn_implementation

    def fail() -> None:
        with attention_implementation(model, ANCHOR):
            assert model.config._attn_implementation == ANCHOR
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert model.config._attn_implementation == before
