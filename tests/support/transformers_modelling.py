"""Checks of `tests/test_modeling_common.py` and of the mixins beside it: outputs, training, attention."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.output_capturing import CompileableContextVar, OutputRecorder
from transformers_checks import LENGTH, ROWS, DoesNotApply, Subject, check, ids, inputs


def same(first: Any, second: Any, **tolerance: float) -> None:
    """Compare outputs part by part; caches are left out."""
    if isinstance(first, torch.Tensor):
        torch.testing.assert_close(first, second, **tolerance)
    elif isinstance(first, (tuple, list)):
        for one, other in zip(first, second, strict=True):
            same(one, other, **tolerance)


def layers_of(model: PreTrainedModel) -> int:
    return int(model.config.num_hidden_layers)


@check
def determinism(subject: Subject) -> None:
    model = subject.model()
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs()).logits, model(**inputs()).logits)


@check
def batching_equivalence(subject: Subject) -> None:
    model = subject.model()
    with torch.no_grad():
        rows = model(**inputs(), output_hidden_states=True)
        one = model(**{name: value[:1] for name, value in inputs().items()}, output_hidden_states=True)
    same(one.logits, rows.logits[:1], **subject.tolerance)
    same(one.hidden_states, tuple(states[:1] for states in rows.hidden_states), **subject.tolerance)


@check
def model_outputs_equivalence(subject: Subject) -> None:
    """As a tuple and as a named output a forward gives the same."""
    model = subject.model()
    for more in ({}, {"output_hidden_states": True}, {"output_attentions": True}):
        for labels in ({}, {"labels": ids()}):
            with torch.no_grad():
                given = {**inputs(), **more, **labels}
                named = model(**given, return_dict=True).to_tuple()
                same(model(**given, return_dict=False), named, atol=1e-5, rtol=0.0)


@check
def inputs_embeds(subject: Subject) -> None:
    model = subject.model()
    mask = inputs()["attention_mask"]
    model(inputs_embeds=model.get_input_embeddings()(ids()), attention_mask=mask)


@check
def inputs_embeds_matches_input_ids(subject: Subject) -> None:
    model = subject.model()
    embeds = model.get_input_embeddings()(ids())
    with torch.no_grad():
        torch.testing.assert_close(model(inputs_embeds=embeds).logits, model(ids()).logits)


@check
def attention_outputs(subject: Subject) -> None:
    shape = (ROWS, subject.config.num_attention_heads, LENGTH, LENGTH)
    model = subject.model("eager")
    with torch.no_grad():
        asked = model(**inputs(), output_attentions=True)
        assert [tuple(layer.shape) for layer in asked.attentions] == [shape] * layers_of(model)
        config = subject.config
        config._attn_implementation = "eager"
        config.output_attentions = True
        built = subject.new(config)
        found = built(**inputs())
        assert [tuple(layer.shape) for layer in found.attentions] == [shape] * layers_of(model)
        more = built(**inputs(), output_attentions=True, output_hidden_states=True)
    assert len(more) == len(found) + 1
    assert list(more)[-1] == "attentions"


@check
def hidden_states_output(subject: Subject) -> None:
    model = subject.model()
    shape = (ROWS, LENGTH, subject.config.hidden_size)
    found = model(**inputs(), output_hidden_states=True).hidden_states
    model.config.output_hidden_states = True
    for states in (found, model(**inputs()).hidden_states):
        assert [tuple(layer.shape) for layer in states] == [shape] * (layers_of(model) + 1)


@check
def retain_grad_hidden_states_attentions(subject: Subject) -> None:
    config = subject.config
    config._attn_implementation = "eager"
    config.output_hidden_states = config.output_attentions = True
    out = subject.new(config)(**inputs())
    kept = (out.hidden_states[0], out.attentions[0])
    for states in kept:
        states.retain_grad()
    out.logits.flatten()[0].backward(retain_graph=True)
    assert all(states.grad is not None for states in kept)


@check
def feed_forward_chunking(subject: Subject) -> None:
    config = subject.config
    config.chunk_size_feed_forward = 1
    one, other = subject.new(), subject.new(config)
    torch.testing.assert_close(one(**inputs()).logits, other(**inputs()).logits, rtol=1e-3, atol=1e-3)


@check
def capture_outputs_decorator(subject: Subject) -> None:
    """One forward collects outputs once, whatever is asked for."""
    model = subject.model()
    recorded = {key for part in model.modules() for key in getattr(part, "_can_record_outputs", None) or {}}
    depth: list[int] = []
    enter, leave = CompileableContextVar.set, CompileableContextVar.reset

    def set_(self: Any, value: Any) -> Any:
        depth.append(len(value))
        assert sum(map(bool, depth)) <= 1, "outputs are collected by two at a time"
        return enter(self, value)

    def reset(self: Any, token: Any) -> None:
        depth.pop()
        leave(self, token)

    asked = {f"output_{key}": True for key in recorded}
    with (
        mock.patch.object(CompileableContextVar, "set", set_),
        mock.patch.object(CompileableContextVar, "reset", reset),
    ):
        model(**inputs(), **asked)


@check
def format_of_can_record_outputs(subject: Subject) -> None:
    for part in subject.model().modules():
        if isinstance(part, PreTrainedModel):
            for name, recorders in (part._can_record_outputs or {}).items():
                assert isinstance(name, str)
                for recorder in recorders if isinstance(recorders, list) else [recorders]:
                    assert isinstance(recorder, (str, type, OutputRecorder))


@check
def can_capture_specific_layers_hidden_states(subject: Subject) -> None:
    model = subject.model()
    with torch.no_grad():
        whole = model(**inputs(), output_hidden_states=True).hidden_states
        some = model(**inputs(), output_hidden_states=[0, -1]).hidden_states
    assert [states is None for states in some] == [False, *[True] * (len(whole) - 2), False]
    same((some[0], some[-1]), (whole[0], whole[-1]))


def has_experts(subject: Subject) -> None:
    if getattr(subject.config, "_experts_implementation", None) is None or subject.family not in (
        "qwen3_moe",
        "gpt_oss",
    ):
        raise DoesNotApply("no experts")


@check
def moe_models_record_router_logits(subject: Subject) -> None:
    has_experts(subject)
    parts = [part for part in subject.model().modules() if isinstance(part, PreTrainedModel)]
    assert any("router_logits" in (part._can_record_outputs or {}) for part in parts)


@check
def output_router_logits_from_config(subject: Subject) -> None:
    has_experts(subject)
    model = subject.model()
    model.config.output_router_logits = False
    asked = model(**inputs(), output_router_logits=True)
    assert len(asked.router_logits) == layers_of(model)
    assert not model(**inputs()).router_logits
    model.config.output_router_logits = True
    found = model(**inputs())
    assert found.router_logits
    assert (found.aux_loss is None) == (asked.aux_loss is None)
    assert not model(**inputs(), output_router_logits=False).router_logits


@check
def eager_matches_batched_and_grouped_inference(subject: Subject) -> None:
    has_experts(subject)
    model = subject.model()
    found = []
    with torch.no_grad():
        for implementation in ("eager", "batched_mm", "grouped_mm"):
            model.set_experts_implementation(implementation)
            found.append(model(**inputs()).logits)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-4)


@check
def eager_matches_sdpa_inference(subject: Subject) -> None:
    if not subject.kind._supports_sdpa:
        raise DoesNotApply("the class does not take SDPA")
    sizes = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}
    if hasattr(subject.config, "num_experts_per_tok"):
        sizes = {torch.float32: 1e-3}  # rounding chooses other experts
    for dtype, size in sizes.items():
        eager, sdpa = (subject.model(name).to(dtype) for name in ("eager", "sdpa"))
        for mask in (None, inputs()["attention_mask"], inputs()["attention_mask"].flip(1)):
            with torch.no_grad():
                one, other = (model(ids(), attention_mask=mask).logits.float() for model in (eager, sdpa))
            seen = torch.ones(ROWS, LENGTH) if mask is None else mask
            torch.testing.assert_close(
                one[seen.bool()], other[seen.bool()], rtol=size, atol=size * float(one.abs().max())
            )


@check
def sliding_window_mask(subject: Subject) -> None:
    """A window in the configuration of layers that can have one is kept; asked of a source's attention only."""
    config = subject.config
    if not hasattr(config, "use_sliding_window") or subject.target != "source":
        raise DoesNotApply("the window is a part of new attention, which its configuration alone does not change")
    values = {**config.to_diff_dict(), "sliding_window": 3, "use_sliding_window": True, "max_window_layers": 0}
    for name in ("layer_types", "rope_parameters"):
        values.pop(name, None)
    model = subject.new(type(config)(**{**values, "attn_implementation": "eager"}))
    position = torch.arange(LENGTH)
    beyond = position <= position[:, None] - 3
    for weights in model(ids(), output_attentions=True).attentions:
        assert bool((weights[..., beyond] == 0).all())


@check
def training(subject: Subject) -> None:
    model = subject.model().train()
    model(**inputs(), labels=ids()).loss.backward()
    missing = [name for name, value in model.named_parameters() if value.grad is None and "expert" not in name]
    assert not missing


def checkpointed(subject: Subject, **options: Any) -> None:
    """With checkpointing the same weights have gradients, and layers run twice."""
    model = subject.model().train()
    model.config.use_cache = False
    torch.manual_seed(0)
    model(**inputs(), labels=ids()).loss.backward()
    plain = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs=options or None)
    layer = next(part for part in model.modules() if isinstance(part, GradientCheckpointingLayer))
    attention = next(part for name, part in layer.named_modules() if name.endswith("attn"))
    calls: list[None] = []
    attention.register_forward_pre_hook(lambda *_: calls.append(None))
    torch.manual_seed(0)
    model(**inputs(), labels=ids()).loss.backward()
    assert len(calls) == 2
    found = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    assert found.keys() == plain.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, plain[name], rtol=1e-3, atol=1e-5, msg=name)


@check
def training_gradient_checkpointing(subject: Subject) -> None:
    checkpointed(subject)


@check
def training_gradient_checkpointing_use_reentrant_false(subject: Subject) -> None:
    checkpointed(subject, use_reentrant=False)


@check
def training_gradient_checkpointing_use_reentrant_true(subject: Subject) -> None:
    checkpointed(subject, use_reentrant=True)


def switched(model: Any) -> None:
    for method, expected in (("activation_checkpointing_enable", True), ("activation_checkpointing_disable", False)):
        getattr(model, method)()
        assert model.is_activation_checkpointing is expected
        flags = [part.gradient_checkpointing for part in model.modules() if hasattr(part, "gradient_checkpointing")]
        assert flags
        assert all(flag is expected for flag in flags)


@check
def gradient_checkpointing_backward_compatibility(subject: Subject) -> None:
    config = subject.config
    config.gradient_checkpointing = True
    assert subject.new(config).is_activation_checkpointing


@check
def gradient_checkpointing_enable_disable(subject: Subject) -> None:
    model = subject.new()
    assert not model.is_activation_checkpointing
    assert any(isinstance(part, GradientCheckpointingLayer) for part in model.modules())
    switched(model)


@check
def peft_gradient_checkpointing_enable_disable(subject: Subject) -> None:
    model = subject.model()
    model._hf_peft_config_loaded = True
    switched(model)


@check
def enable_input_require_grads(subject: Subject) -> None:
    model = subject.model()
    model.enable_input_require_grads()
    model.disable_input_require_grads()


@check
def enable_input_require_grads_with_gradient_checkpointing(subject: Subject) -> None:
    model = subject.model().train()
    model.config.use_cache = False
    model.activation_checkpointing_enable()
    model.enable_input_require_grads()
    model(**inputs(), labels=ids()).loss.backward()
    gradient = model.get_input_embeddings().weight.grad
    assert bool(torch.isfinite(gradient).all())
    assert float(gradient.abs().sum()) > 0


@check
def causal_lm_loss_honors_shift_labels(subject: Subject) -> None:
    model = subject.model()
    scores = model(**inputs()).logits
    likely, unlikely = scores.argmax(-1), scores.argmin(-1)

    def loss(labels: torch.Tensor, shifted: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = model(**inputs(), labels=labels, shift_labels=shifted).loss
        return result

    base = loss(ids(), likely)
    assert not torch.equal(base, loss(ids(), unlikely))
    assert torch.equal(base, loss(ids(seed=5), likely))


@check
def training_overfit(subject: Subject) -> None:
    """A model learns one sequence by heart, and writes it down."""
    model = subject.model().train()
    sequence = torch.arange(3, 3 + 12)[None]
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(sequence, labels=sequence).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.1 * losses[0]
    made = model.eval().generate(sequence[:, :3], max_new_tokens=9, do_sample=False)
    assert torch.equal(made, sequence)
