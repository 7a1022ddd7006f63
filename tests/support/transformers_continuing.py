"""Checks of `tests/generation/test_utils.py`: from embeddings and caches, continued, compiled, packed, masked."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig, DynamicCache, GenerationMixin, StaticCache
from transformers_checks import LENGTH, ROWS, VOCABULARY, DoesNotApply, Subject, check, ids, inputs, slow
from transformers_generation import (
    EVERYTHING,
    GREEDY,
    alike,
    cache_holds,
    generated,
    outputs_hold,
    positions,
)


def from_embeds(subject: Subject, beams: int) -> None:
    model, given = subject.model(), inputs()
    given.pop("input_ids")
    embeds = model.get_input_embeddings()(ids())
    settings: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": beams, **GREEDY}
    settings |= {"output_scores": True, "return_dict_in_generate": True}
    plain = model.generate(ids(), **given, **settings)
    both = model.generate(ids(), inputs_embeds=embeds, **given, **settings)
    alike(plain, both, **subject.tolerance)
    alone = model.generate(inputs_embeds=embeds, **given, **settings)
    both.sequences = both.sequences[:, LENGTH:]
    alike(alone, both, **subject.tolerance)


@check
def generate_from_inputs_embeds_greedy(subject: Subject) -> None:
    from_embeds(subject, 1)


@check
def generate_from_inputs_embeds_beam_search(subject: Subject) -> None:
    from_embeds(subject, 2)


def static(subject: Subject) -> None:
    if not subject.kind._can_compile_fullgraph:
        raise DoesNotApply("the class takes no static cache")


@check
def generate_from_inputs_embeds_with_static_cache(subject: Subject) -> None:
    static(subject)
    model = subject.model()
    settings = {"max_new_tokens": 10, "cache_implementation": "static", "return_dict_in_generate": True}
    embeds = model.get_input_embeddings()(ids())
    out = model.generate(inputs_embeds=embeds, attention_mask=inputs()["attention_mask"], **settings)
    assert isinstance(out.past_key_values, StaticCache)
    cache_holds(out.past_key_values, model, ROWS, LENGTH + 9)


def same_caches(first: Any, second: Any) -> None:
    assert len(first.layers) == len(second.layers)
    for one, other in zip(first.layers, second.layers, strict=True):
        assert type(one) is type(other)
        torch.testing.assert_close((one.keys, one.values), (other.keys, other.values))


def left_padded() -> dict[str, Tensor]:
    mask = torch.ones(ROWS, LENGTH, dtype=torch.long)
    mask[0, :1] = mask[1:, :2] = 0
    return {"input_ids": ids(), "attention_mask": mask}


@check
def generate_continue_from_past_key_values(subject: Subject) -> None:
    """In two calls the same tokens as in one, and the same cache."""
    model = subject.model()
    settings = {**GREEDY, "return_dict_in_generate": True, "output_scores": True}
    whole = model.generate(**left_padded(), max_new_tokens=4, **settings)
    first = model.generate(**left_padded(), max_new_tokens=3, **settings)
    mask = torch.nn.functional.pad(left_padded()["attention_mask"], (0, 3), value=1)
    cache = {"past_key_values": first.past_key_values}
    second = model.generate(first.sequences, attention_mask=mask, max_new_tokens=1, **cache, **settings)
    second.scores = first.scores + second.scores
    alike(whole, second, **subject.tolerance)
    same_caches(whole.past_key_values, second.past_key_values)


@check
def generate_continue_from_inputs_embeds(subject: Subject) -> None:
    model = subject.model()
    settings = {**GREEDY, "return_dict_in_generate": True}
    embed = model.get_input_embeddings()
    start = embed(ids())
    whole = model.generate(inputs_embeds=start, max_new_tokens=4, **settings)
    first = model.generate(inputs_embeds=start, max_new_tokens=3, **settings)
    longer = torch.cat((start, embed(first.sequences)), 1)
    cache = {"past_key_values": first.past_key_values}
    second = model.generate(inputs_embeds=longer, max_new_tokens=1, **cache, **settings)
    assert torch.equal(whole.sequences, torch.cat((first.sequences, second.sequences), 1))
    same_caches(whole.past_key_values, second.past_key_values)


@check
def generate_with_static_cache(subject: Subject) -> None:
    static(subject)
    settings = {"max_new_tokens": 20, "return_dict_in_generate": True, "output_scores": True, **GREEDY}
    for dtype in (torch.float32, torch.float16):
        model = subject.model().to(dtype)
        fixed = model.generate(**inputs(), cache_implementation="static", **settings)
        cache_holds(fixed.past_key_values, model, ROWS, LENGTH + 19)
        tolerance = subject.tolerance if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
        alike(model.generate(**inputs(), **settings), fixed, **tolerance)


@check
@slow
def generate_compile_model_forward_fullgraph(subject: Subject) -> None:
    """Compiled as one graph for a static cache, for two prompts in turn."""
    static(subject)
    model = subject.model()
    compiling = CompileConfig(fullgraph=True, dynamic=False)
    compiling._compile_all_devices = True
    settings: dict[str, Any] = {"max_new_tokens": 5, "return_dict_in_generate": True, "output_scores": True, **GREEDY}
    prompts = [{"input_ids": ids(2, seed=seed), "attention_mask": inputs(2)["attention_mask"]} for seed in (0, 1)]
    torch.compiler.reset()
    with torch.compiler.set_stance("force_eager"):
        plain = [model.generate(**prompt, **settings) for prompt in prompts]
    assert all(isinstance(out.past_key_values, DynamicCache) for out in plain)
    assert not hasattr(model, "_compiled_call")
    settings |= {"compile_config": compiling, "cache_implementation": "static"}
    for prompt, expected in zip(prompts, plain, strict=True):
        out = model.generate(**prompt, **settings)
        assert hasattr(model, "_compiled_call")
        assert out.past_key_values.is_compileable
        alike(expected, out, **subject.tolerance)


@check
@slow
def generate_compilation_all_outputs(subject: Subject) -> None:
    static(subject)
    model = subject.model("eager")
    model.generation_config.compile_config = CompileConfig()
    model.generation_config.compile_config._compile_all_devices = True
    model.generation_config.cache_implementation = "static"
    torch.compiler.reset()
    out = generated(model, use_cache=True, **EVERYTHING, **GREEDY)
    assert hasattr(model, "_compiled_call")
    outputs_hold(out, model, ROWS, use_cache=True, static=True)


@check
def generate_methods_with_logits_to_keep(subject: Subject) -> None:
    model = subject.model()
    one, other = (
        model.generate(**inputs(), max_new_tokens=10, **GREEDY, **more) for more in ({"logits_to_keep": 0}, {})
    )
    assert torch.equal(one, other)


@check
def forward_with_logits_to_keep(subject: Subject) -> None:
    model = subject.model()
    with torch.no_grad():
        every, last = (model(**inputs(), logits_to_keep=count).logits for count in (0, 1))
    assert every.shape == (ROWS, LENGTH, VOCABULARY)
    torch.testing.assert_close(every[:, -1:], last, rtol=1e-5, atol=1e-5)


@check
def inherits_generation_mixin(subject: Subject) -> None:
    assert GenerationMixin in subject.kind.__bases__


@check
def prepare_inputs_for_generation_kwargs_forwards(subject: Subject) -> None:
    given = {"output_attentions": True, "output_hidden_states": True, "custom_arg": "value", "numeric_arg": 42}
    where = torch.arange(3).expand(2, 3)
    made = subject.model().prepare_inputs_for_generation(input_ids=ids(2, 3), position_ids=where, **given)
    assert "input_ids" in made
    assert {name: made.get(name) for name in given} == given


@check
def eager_matches_sdpa_generate(subject: Subject) -> None:
    if not subject.kind._supports_sdpa:
        raise DoesNotApply("the class does not take SDPA")
    settings = {"max_new_tokens": 3, "return_dict_in_generate": True, "output_scores": True, **GREEDY}
    with tempfile.TemporaryDirectory() as directory:
        subject.model().save_pretrained(directory)
        found = []
        for name in ("eager", "sdpa"):
            model = subject.kind.from_pretrained(directory, dtype=torch.float16, attn_implementation=name)
            model.generation_config.eos_token_id = None
            found.append(model.generate(**inputs(), **settings))
    alike(*found, atol=1e-2, rtol=1e-2)


def packed(subject: Subject, attention: str) -> None:
    """Documents in one row, told apart by positions that start again, give what padded rows give."""
    if attention == "sdpa" and not subject.kind._supports_sdpa:
        raise DoesNotApply("the class does not take SDPA")
    model = subject.model(attention)
    mask = inputs()["attention_mask"].flip(1)
    real = mask.bool()
    with torch.no_grad():
        rows = model(ids(), attention_mask=mask, position_ids=positions(mask), use_cache=False).logits[real]
        where = torch.cat([torch.arange(int(count)) for count in mask.sum(1)])[None]
        row = model(ids()[real][None], position_ids=where, use_cache=False).logits[0]
    torch.testing.assert_close(row, rows, **{name: max(1e-4, size) for name, size in subject.tolerance.items()})


@check
def eager_padding_matches_padding_free_with_position_ids(subject: Subject) -> None:
    packed(subject, "eager")


@check
def sdpa_padding_matches_padding_free_with_position_ids(subject: Subject) -> None:
    packed(subject, "sdpa")


@check
def custom_4d_attention_mask(subject: Subject) -> None:
    """Three continuations of one prefix in one row, kept apart by a mask of the caller's."""
    static(subject)
    if getattr(subject.config, "sliding_window", None):
        raise DoesNotApply("a mask of the caller's says nothing of a window")
    model = subject.model()
    rows = torch.tensor([[10, 11, 12, last] for last in (13, 14, 15)])
    shown = torch.ones(6, 6).tril()
    shown[4, 3] = shown[5, 3] = shown[5, 4] = 0
    mask = ((shown == 0) * torch.finfo(torch.float32).min)[None, None]
    where = torch.tensor([[0, 1, 2, 3, 3, 3]])
    with torch.no_grad():
        one = model(rows, position_ids=torch.arange(4).expand(3, 4)).logits[:, -1]
        other = model(torch.tensor([[10, 11, 12, 13, 14, 15]]), attention_mask=mask, position_ids=where).logits[0, -3:]
    torch.testing.assert_close(one.softmax(-1), other.softmax(-1), rtol=1e-3, atol=1e-3)


@check
def generate_with_and_without_position_ids(subject: Subject) -> None:
    model = subject.model()
    given = left_padded()
    plain = model.generate(**given, max_new_tokens=5, use_cache=True, **GREEDY)
    where = positions(given["attention_mask"])
    assert torch.equal(plain, model.generate(**given, position_ids=where, max_new_tokens=5, use_cache=True, **GREEDY))
