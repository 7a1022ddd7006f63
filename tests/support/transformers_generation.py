"""Checks of `tests/generation/test_utils.py`: what `generate` gives out, assisted generation, caches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.generation import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput
from transformers_checks import LENGTH, NEW_TOKENS, ROWS, VOCABULARY, Subject, check, ids, inputs

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
