"""Checks of `tests/generation/test_utils.py`: what `generate` gives out, caches, continued and assisted generation."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, CompileConfig, DynamicCache, GenerationMixin, StaticCache
from transformers.generation import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput
from transformers_checks import LENGTH, NEW_TOKENS, ROWS, VOCABULARY, DoesNotApply, Subject, check, ids, inputs, slow

PROCESSORS = {"bad_words_ids": [[1, 0]], "repetition_penalty": 1.2, "remove_invalid_values": True}
SAMPLING = {"do_sample": True, "top_k": 10, "top_p": 0.7, "temperature": 0.7}
GREEDY = {"do_sample": False}
BEAMS = {"num_beams": 2, "early_stopping": False, "length_penalty": 2.0}
EVERYTHING = {f"output_{name}": True for name in ("scores", "logits", "hidden_states", "attentions")} | {
    "return_dict_in_generate": True
}


def generated(model: Any, given: dict[str, Any] | None = None, **options: Any) -> Any:
    torch.manual_seed(42)
    length = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    return model.generate(**(inputs() if given is None else given), **{**length, **PROCESSORS, **options})


def alike(first: Any, second: Any, **tolerance: float) -> None:
    """The same tokens, or the same scores up to where they part."""
    prompt = first.sequences.shape[1] - len(first.scores)
    for row, differs in enumerate(first.sequences != second.sequences):
        if bool(differs.any()):
            step = int(differs.int().argmax()) - prompt
            torch.testing.assert_close(first.scores[step][row], second.scores[step][row], **tolerance)


def cache_holds(cache: Any, model: Any, rows: int, length: int) -> None:
    """Each layer holds what its configuration says; a rewritten one the latent or the window that its own says."""
    config = model.config
    assert isinstance(cache, Cache)
    assert len(cache.layers) == config.num_hidden_layers
    rewritten = {}
    for site in getattr(config, "attnedit", {"sites": {}})["sites"]:
        parts = dict(model.get_submodule(site).named_children())
        found = parts.get("mla", parts.get("gateswa"))
        rewritten[found.config.layer_idx] = found.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for index, layer in enumerate(cache.layers):
        own: Any = rewritten.get(index)
        shapes = tuple(layer.keys.shape), tuple(layer.values.shape)
        if own is None:
            assert shapes == ((rows, config.num_key_value_heads, length, head),) * 2
        elif hasattr(own, "kv_lora_rank"):
            assert shapes == ((rows, 1, length, own.kv_lora_rank), (rows, 1, length, own.qk_rope_head_dim))
        else:
            assert shapes[0] == (rows, own.num_key_value_heads, shapes[0][2], own.head_dim)
            assert shapes[0][2] <= own.sliding_window + own.sink_tokens
            assert getattr(layer, "max_cache_len", layer.get_seq_length()) == length


def outputs_hold(out: Any, model: Any, rows: int, *, use_cache: bool, static: bool = False) -> None:
    """Everything that was asked for is there, step by step, in the shapes that it has to have."""
    config, steps = model.config, out.sequences.shape[1] - LENGTH
    assert [tuple(scores.shape) for scores in out.scores] == [(rows, VOCABULARY)] * steps
    assert [tuple(logits.shape) for logits in out.logits] == [(rows, VOCABULARY)] * steps
    assert len(out.attentions) == len(out.hidden_states) == steps
    whole = LENGTH + steps - 1
    for step in range(steps):
        new = 1 if use_cache and step else LENGTH + step
        keys = whole if static else LENGTH + step
        weights = (rows, config.num_attention_heads, new, keys)
        assert [tuple(layer.shape) for layer in out.attentions[step]] == [weights] * config.num_hidden_layers
        states = (rows, new, config.hidden_size)
        assert [tuple(layer.shape) for layer in out.hidden_states[step]] == [states] * (config.num_hidden_layers + 1)
    if use_cache:
        cache_holds(out.past_key_values, model, rows, whole)
    else:
        assert out.past_key_values is None


def length_is_kept(subject: Subject, **options: Any) -> None:
    assert generated(subject.model(), **options).shape == (ROWS, LENGTH + NEW_TOKENS)


def everything_is_given(subject: Subject, kind: Any, rows: int, *, use_cache: bool, **options: Any) -> None:
    model = subject.model("eager")
    out = generated(model, use_cache=use_cache, **EVERYTHING, **options)
    assert type(out) is kind
    assert out.sequences.shape[1] == LENGTH + NEW_TOKENS
    outputs_hold(out, model, rows, use_cache=use_cache)


@check
def greedy_generate(subject: Subject) -> None:
    length_is_kept(subject, **GREEDY)


@check
def greedy_generate_dict_outputs(subject: Subject) -> None:
    everything_is_given(subject, GenerateDecoderOnlyOutput, ROWS, use_cache=False, **GREEDY)


@check
def greedy_generate_dict_outputs_use_cache(subject: Subject) -> None:
    everything_is_given(subject, GenerateDecoderOnlyOutput, ROWS, use_cache=True, **GREEDY)


@check
def sample_generate(subject: Subject) -> None:
    length_is_kept(subject, **SAMPLING)


@check
def sample_generate_dict_output(subject: Subject) -> None:
    options = {"num_return_sequences": 2, **SAMPLING}
    everything_is_given(subject, GenerateDecoderOnlyOutput, 2 * ROWS, use_cache=False, **options)


@check
def beam_search_generate(subject: Subject) -> None:
    length_is_kept(subject, **GREEDY, **BEAMS)


@check
def beam_search_generate_dict_output(subject: Subject) -> None:
    everything_is_given(subject, GenerateBeamDecoderOnlyOutput, 2 * ROWS, use_cache=False, **GREEDY, **BEAMS)


@check
def beam_search_generate_dict_outputs_use_cache(subject: Subject) -> None:
    everything_is_given(subject, GenerateBeamDecoderOnlyOutput, 2 * ROWS, use_cache=True, **GREEDY, **BEAMS)


@check
def beam_sample_generate(subject: Subject) -> None:
    length_is_kept(subject, **SAMPLING, **BEAMS)


@check
def beam_sample_generate_dict_output(subject: Subject) -> None:
    everything_is_given(subject, GenerateBeamDecoderOnlyOutput, 2 * ROWS, use_cache=False, **SAMPLING, **BEAMS)


@check
def generate_without_input_ids(subject: Subject) -> None:
    assert subject.model().generate(do_sample=False, max_new_tokens=NEW_TOKENS).shape == (1, 1 + NEW_TOKENS)


ASSISTED = {"max_new_tokens": 4, "num_beams": 1, "use_cache": True}


def one_row() -> dict[str, Tensor]:
    return {"input_ids": ids(1), "attention_mask": torch.ones(1, LENGTH, dtype=torch.long)}


def assisted(subject: Subject, assistant: Any = None, **options: Any) -> None:
    """Candidates from elsewhere change no token."""
    model = subject.model("eager")
    settings: dict[str, Any] = {**ASSISTED, **GREEDY, **PROCESSORS, **EVERYTHING}
    plain = model.generate(**one_row(), **settings)
    if assistant is not None:
        assistant.generation_config.num_assistant_tokens = 2
        assistant.generation_config.num_assistant_tokens_schedule = "constant"
        options["assistant_model"] = assistant
    found = model.generate(**one_row(), **settings, **options)
    alike(plain, found, **subject.tolerance)
    outputs_hold(plain, model, 1, use_cache=True)
    assert found.sequences.shape == plain.sequences.shape
    assert len(found.scores) == len(found.attentions) == 4


@check
def assisted_decoding_matches_greedy_search_random(subject: Subject) -> None:
    config = subject.config
    config._attn_implementation = "eager"
    assisted(subject, subject.new(config))


@check
def assisted_decoding_matches_greedy_search_same(subject: Subject) -> None:
    assisted(subject, subject.model("eager"))


@check
def prompt_lookup_decoding_matches_greedy_search(subject: Subject) -> None:
    assisted(subject, prompt_lookup_num_tokens=2)


@check
def assisted_decoding_sample(subject: Subject) -> None:
    model, assistant = subject.model("eager"), subject.model("eager")
    settings: dict[str, Any] = {**ASSISTED, **PROCESSORS, **EVERYTHING, "do_sample": True}
    out = model.generate(**one_row(), assistant_model=assistant, **settings)
    assert out.sequences.shape == (1, LENGTH + 4)


def positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)


@check
def left_padding_compatibility(subject: Subject) -> None:
    model = subject.model()
    mask = torch.ones(ROWS, LENGTH, dtype=torch.long)
    padded = torch.cat((torch.zeros(ROWS, 32, dtype=torch.long), ids()), 1)
    shown = torch.cat((torch.zeros(ROWS, 32, dtype=torch.long), mask), 1)
    with torch.no_grad():
        plain = model(ids(), attention_mask=mask, position_ids=positions(mask), use_cache=False).logits[:, -1]
        found = model(padded, attention_mask=shown, position_ids=positions(shown), use_cache=False).logits[:, -1]
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)


@check
def past_key_values_format(subject: Subject) -> None:
    """Keys and values of the shape that the layer's configuration gives."""
    model = subject.model()
    cache_holds(model(**inputs(), use_cache=True).past_key_values, model, ROWS, LENGTH)


@check
def generate_from_random_inputs_embeds(subject: Subject) -> None:
    model = subject.model()
    embeds = model.get_input_embeddings()(ids())
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "output_scores": True, "return_dict_in_generate": True}
    one = model.generate(ids(), inputs_embeds=embeds, **GREEDY, **settings)
    other = model.generate(ids(), inputs_embeds=torch.rand_like(embeds), **GREEDY, **settings)
    assert not any(torch.allclose(a, b) for a, b in zip(one.scores, other.scores, strict=True))


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
