"""Calibration data from every kind of source, evaluation, and what a live cache holds."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pytest
import torch
from pyarrow import parquet
from tiny_llama import make_llama, make_tokenizer
from torch.nn import functional
from transformers import LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from attnedit.compiler.data.documents import read_documents
from attnedit.compiler.data.token_windows import demo_text, text_tokens, token_windows
from attnedit.compiler.errors import AttneditError, UsageError
from attnedit.compiler.evaluation.evaluate import kv_usage, perplexity

SENTENCE = "The cache decides what a long context costs. "


def windows(source: object, tokenizer: PreTrainedTokenizerFast | None, model: LlamaForCausalLM, **options: object):  # type: ignore[no-untyped-def]
    return token_windows(source, tokenizer, model, **options)  # type: ignore[arg-type]


def test_windows_are_as_long_as_the_context(
    text_file: Path, tokenizer: PreTrainedTokenizerFast, llama: LlamaForCausalLM
) -> None:
    tokens = windows(str(text_file), tokenizer, llama, tokens=2048)
    assert tokens.shape == (8, 256)
    assert tokens.dtype == torch.int64


def test_windows_are_spread_over_a_long_text(
    text_file: Path, tokenizer: PreTrainedTokenizerFast, llama: LlamaForCausalLM
) -> None:
    text = text_file.read_text()
    tokens = windows(text_file, tokenizer, llama, tokens=2048)
    places = [text.index(tokenizer.decode(row)) for row in tokens]
    assert places == sorted(places)
    for share, place in enumerate(places):
        assert share * len(text) / 8 <= place <= (share + 1) * len(text) / 8


def test_the_seed_decides(text_file: Path, tokenizer: PreTrainedTokenizerFast, llama: LlamaForCausalLM) -> None:
    first, again, other = (windows(text_file, tokenizer, llama, tokens=2048, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_text_of_fewer_tokens_is_used_whole(tokenizer: PreTrainedTokenizerFast, llama: LlamaForCausalLM) -> None:
    text = (SENTENCE * 20)[:600]
    tokens = windows([text], tokenizer, llama, tokens=4096, window=100)
    assert tokenizer.decode(tokens.flatten()) == text


def test_documents_are_joined_by_the_end_token(tokenizer: PreTrainedTokenizerFast, llama: LlamaForCausalLM) -> None:
    tokens = windows([SENTENCE, SENTENCE], tokenizer, llama, tokens=50, window=50)
    assert int((tokens == tokenizer.eos_token_id).sum()) == 1


def test_a_window_starts_as_the_tokenizer_starts_a_text(llama: LlamaForCausalLM) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", 0)]
    )
    tokens = windows([SENTENCE * 50], tokenizer, llama, tokens=200, window=50)
    assert (tokens[:, 0] == 0).all()
    assert (tokens[:, 1:] != 0).all()


def test_an_endless_stream_is_read_only_as_far_as_needed(
    tokenizer: PreTrainedTokenizerFast, llama: LlamaForCausalLM
) -> None:
    def stream() -> Iterator[str]:
        while True:
            yield SENTENCE

    assert windows(stream(), tokenizer, llama, tokens=1024).shape == (4, 256)


def test_jsonl_of_texts_and_chats(tmp_path: Path, llama: LlamaForCausalLM) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    file = tmp_path / "data.jsonl"
    chat = {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": SENTENCE * 3}]}
    file.write_text("\n".join(json.dumps(record) for record in [{"text": SENTENCE * 3}, chat]) + "\n\n")
    text = tokenizer.decode(windows(file, tokenizer, llama, tokens=4096, window=20).flatten())
    assert "[user] Why?" in text
    assert text.startswith("The cache")


def test_parquet(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, llama: LlamaForCausalLM) -> None:
    file = tmp_path / "data.parquet"
    parquet.write_table(pyarrow.table({"id": [1, 2], "text": [SENTENCE * 4, SENTENCE * 4]}), file)
    assert windows(file, tokenizer, llama, tokens=300, window=100).shape == (3, 100)


EXCHANGE = {"instruction": "Say why.", "input": "A cache.", "output": "It is read."}
SHARED = {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]}
RECORDS: dict[str, tuple[object, str]] = {
    "strings": (["one", "two"], "one|two"),
    "texts": ([{"text": "one"}, {"content": "two"}], "one|two"),
    "alpaca": (
        [EXCHANGE, {**EXCHANGE, "input": ""}],
        "<user>Say why.\n\nA cache.<assistant>It is read.|<user>Say why.<assistant>It is read.",
    ),
    "sharegpt": ([SHARED], "<user>Why?<assistant>Because."),
    "prompts": ([{"prompt": "Why?", "completion": "Because."}], "<user>Why?<assistant>Because."),
    "in a field": ({"version": "1", "data": [{"text": "one"}]}, "one"),
    "one record": ({"text": "one"}, "one"),
    "dolly": (
        [{"instruction": "Say why.", "context": "A cache.", "response": "It is read."}],
        "<user>Say why.\n\nA cache.<assistant>It is read.",
    ),
    "question": ([{"question": "Why?", "answer": "Because."}], "<user>Why?<assistant>Because."),
    "a system prompt beside a chat": (
        [{"system": "Be kind.", **SHARED}],
        "<system>Be kind.<user>Why?<assistant>Because.",
    ),
    "a system prompt in a chat too": (
        [{"system": "Be kind.", "messages": [{"role": "system", "content": "Be kind."}]}],
        "<system>Be kind.",
    ),
    "alpaca with a history": (
        [{**EXCHANGE, "input": None, "system": "Be kind.", "history": [["One?", "Two."]]}],
        "<system>Be kind.<user>One?<assistant>Two.<user>Say why.<assistant>It is read.",
    ),
    "text in parts": (
        [{"messages": [{"role": "user", "content": [{"type": "text", "text": "Why"}, {"type": "text", "text": "?"}]}]}],
        "<user>Why?",
    ),
    "null beside a chat": ([{"text": None, **SHARED}], "<user>Why?<assistant>Because."),
}
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "byte order mark"])
@pytest.mark.parametrize(("records", "expected"), RECORDS.values(), ids=RECORDS)
def test_json_is_read_as_records(records: object, expected: str, mark: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    file = tmp_path / "data.json"
    file.write_text(mark + json.dumps(records, indent=1), encoding="utf-8")
    assert list(read_documents(file, tokenizer)) == expected.split("|")
    if isinstance(records, list):
        lines = tmp_path / "data.jsonl"
        lines.write_text(mark + ("\n" + mark).join(map(json.dumps, records)), encoding="utf-8")
        assert list(read_documents(lines, tokenizer)) == expected.split("|")
        lines.rename(file)  # lines in spite of the name
        assert list(read_documents(file, tokenizer)) == expected.split("|")


@pytest.mark.parametrize(
    ("content", "found"), [(None, "null"), (3, "a int"), ([{"words": "x"}], "a list"), (["x"], "a list")]
)
def test_a_message_without_text_is_refused(content: object, found: str, tmp_path: Path) -> None:
    """Templates would write whatever it is as Python prints it."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    file = tmp_path / "data.jsonl"
    for message in ({"role": "user", "content": content}, {"from": "human", "value": content}):
        file.write_text(json.dumps({"messages": [message]}), encoding="utf-8")
        with pytest.raises(UsageError, match=f"line 1 has a message whose text is {found}"):
            list(read_documents(file, tokenizer))
    file.write_text('{"messages": [{"content": "x"}]}', encoding="utf-8")
    with pytest.raises(UsageError, match="line 1 has a message without a role"):
        list(read_documents(file, tokenizer))


def test_an_exchange_without_a_chat_template_is_text(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    file = tmp_path / "data.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([EXCHANGE]), file)
    assert list(read_documents(file, tokenizer)) == ["Say why.\n\nA cache.\n\nIt is read."]


def test_a_byte_order_mark_is_no_text(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "a.txt").write_text("\ufeffText", encoding="utf-8")
    assert list(read_documents(tmp_path / "a.txt", tokenizer)) == ["Text"]


def test_tensors_of_ids(llama: LlamaForCausalLM) -> None:
    ids = torch.arange(200).remainder(250)
    assert torch.equal(windows([ids, ids], None, llama, tokens=400, window=100).flatten(), torch.cat([ids, ids]))
    ready = ids.view(4, 50)
    assert torch.equal(windows(ready, None, llama), ready)


def test_samples_are_the_models_own(llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    seen: list[tuple[int, int]] = []
    first = windows(None, tokenizer, llama, tokens=512, progress=lambda stage, done, total: seen.append((done, total)))
    assert first.numel() == 512
    assert (first[:, 0] == tokenizer.bos_token_id).all()
    assert torch.equal(first, windows(None, tokenizer, llama, tokens=512))
    assert not torch.equal(first, windows(None, tokenizer, llama, tokens=512, seed=1))
    assert seen[-1][0] == seen[-1][1]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "empty"),
        (["", "  "], "holds no text"),
        (["short"], "is too short: 5 tokens, and one window needs 256"),
        ([torch.zeros(10, dtype=torch.int64)], "too short: 10 tokens, and one window needs 256"),
        ([torch.zeros(300)], "float32"),
        ([torch.full((300,), 260)], "token id 260"),
        ([torch.full((300,), -1)], "token id -1"),
        (3, "cannot be a int"),
        ([3], "holds int"),
        ("gone.txt", "does not exist"),
        ("nobody/no-such-dataset", "could not be read as a dataset"),
    ],
)
def test_bad_data_is_refused(
    source: object, message: str, tokenizer: PreTrainedTokenizerFast, llama: LlamaForCausalLM
) -> None:
    with pytest.raises(UsageError, match=message):
        windows(source, tokenizer, llama)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "holds no text"),
        ("a.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("a.jsonl", b'{"text": "fine"}\n{"text": ', "line 2 is not JSON"),
        ("a.jsonl", b'{"title": "only"}', "no field text or messages"),
        ("a.jsonl", b"[1, 2]", "holds a list"),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": "x"}]}', "no chat template"),
        ("a.jsonl", b'"fine"\n{"text": null, "id": 1}', "a.jsonl line 2: text is null, where text is expected"),
        ("a.jsonl", b'{"messages": {}, "text": 3}', "text is a int and messages is a dict"),
        ("a.json", b'[{"text": "fine"}, {"text": null}]', "a.json record 2: text is null"),
        ("a.json", b'[{"instruction": "x", "output": "y", "history": ["z"]}]', "history must hold pairs of texts"),
        ("a.jsonl", b'{"messages": [{"content": "x"}]}', "no chat template"),
        ("a.json", b'[{"title": "only"}]', "record 1 has no field text or messages"),
        ("a.json", b'{"a": [1], "b": [2]}', "has no field text or messages"),
        ("a.json", b'[{"text": ', "a.json is not JSON"),
        ("a.json", b'{"text": "fine"}\n{"text": ', "a.json line 2 is not JSON"),
        ("a.json", b'[{"conversations": [{"from": "x", "value": "y"}]}]', "no chat template"),
        ("a.json", b"[3]", "holds a int"),
        ("a.csv", b"text\nfine", "is a table"),
        ("a.parquet", b"not parquet", "as parquet"),
    ],
)
def test_bad_files_are_refused(
    name: str,
    content: bytes,
    message: str,
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    llama: LlamaForCausalLM,
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        windows(tmp_path / name, tokenizer, llama)


def test_text_without_a_tokenizer(llama: LlamaForCausalLM, text_file: Path) -> None:
    with pytest.raises(UsageError, match="needs a tokenizer"):
        windows(text_file, None, llama)
    with pytest.raises(UsageError, match="needs a tokenizer"):
        text_tokens(text_file, None)


def test_a_directory_is_no_text(llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a directory"):
        windows(tmp_path, tokenizer, llama)


@pytest.mark.parametrize("text", ["Two lines\nof text.", "word " * 1000])
def test_a_text_is_no_name(text: str, llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    message = rf"^a string of {len(text)} characters names no file and no dataset .*give texts as a list of strings$"
    with pytest.raises(UsageError, match=message) as caught:
        windows(text, tokenizer, llama)
    assert len(str(caught.value)) < 200
    with pytest.raises(UsageError, match=message):
        text_tokens(text, tokenizer)


def test_the_demo_text_is_prose_in_two_disjoint_parts() -> None:
    calibration, evaluation = demo_text()
    assert len(calibration) > 100_000
    assert len(evaluation) > 40_000
    assert not set(calibration.split("\n\n")) & set(evaluation.split("\n\n"))


def test_perplexity_is_the_protocol(
    llama: LlamaForCausalLM, text_file: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokens = text_tokens(text_file, tokenizer)
    assert tokenizer.decode(tokens[:500]) == text_file.read_text()[:500]
    result = perplexity(llama, tokens, seq_len=64, windows=5, batch=2)
    rows = tokens[:320].view(5, 64)
    with torch.no_grad():
        logits = llama(rows).logits[:, :-1]
    expected = functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), rows[:, 1:].reshape(-1))
    assert result.loss == pytest.approx(float(expected), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(float(expected)), rel=1e-5)
    assert result.tokens == 5 * 63


def test_evaluation_refuses_what_makes_no_sense(llama: LlamaForCausalLM) -> None:
    tokens = torch.zeros(200, dtype=torch.int64)
    with pytest.raises(UsageError, match="at most 3 windows"):
        perplexity(llama, tokens, seq_len=64, windows=4)
    with pytest.raises(UsageError, match="at least 2 and 1"):
        perplexity(llama, tokens, seq_len=1, windows=4)
    with pytest.raises(UsageError, match="token id 300"):
        perplexity(llama, tokens + 300, seq_len=64, windows=2)
    broken = make_llama()
    broken.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(AttneditError, match="loss on the evaluation text is nan"):
        perplexity(broken, tokens, seq_len=64, windows=2)


def test_the_cache_is_counted_live(llama: LlamaForCausalLM) -> None:
    usage = kv_usage(llama)
    assert usage.per_layer == (64.0, 64.0)
    assert usage.values_per_token_layer == 64
    assert usage.bytes_per_token == 2 * 64 * 4
    assert usage.length == 256
    assert kv_usage(make_llama().to(torch.bfloat16)).bytes_per_token == 2 * 64 * 2


def test_a_window_costs_its_share() -> None:
    config = MistralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=32,
        max_position_embeddings=128,
    )
    assert kv_usage(MistralForCausalLM(config)).values_per_token_layer == 32 * 32 / 128


def test_a_mixture_takes_from_each_by_weight(
    tokenizer: PreTrainedTokenizerFast, llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(name * 20_000, encoding="utf-8")
    mixture = {str(tmp_path / "a.txt"): 3, str(tmp_path / "b.txt"): 1, "not read": 0}
    windows = token_windows(mixture, tokenizer, llama, tokens=6400, window=64)
    assert windows.shape == (100, 64)
    (first,) = tokenizer("a", add_special_tokens=False)["input_ids"]
    assert int((windows == first).sum()) == 75 * 64
    for wrong in ({"a": -1.0}, {"a": 0.0}, {"a": "1"}, {"a": float("nan")}):
        with pytest.raises(UsageError, match="weight"):
            token_windows(wrong, tokenizer, llama, tokens=640)  # type: ignore[arg-type]
