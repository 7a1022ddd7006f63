"""A byte-level BPE tokenizer as llama.cpp stores it, recognised by its rules and refused where they differ."""

from __future__ import annotations

import json
from typing import Any

from gguf import Keys, TokenType
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from attnedit.compiler.errors import UsageError

QWEN2_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_REGEX = QWEN2_REGEX.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
SPLIT_BYTES = {**BYTES, "use_regex": False}


def _split(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


# llama.cpp's name, the steps before BPE, and whether words that are tokens are looked up before merges.
PRE_TOKENIZERS: list[tuple[str, list[dict[str, Any]], bool]] = [
    ("gpt-2", [BYTES], False),
    ("smollm", [{"type": "Digits", "individual_digits": True}, BYTES], False),
    ("qwen2", [_split(QWEN2_REGEX), SPLIT_BYTES], False),
    ("llama-bpe", [_split(LLAMA3_REGEX), SPLIT_BYTES], True),
]
PLAIN_BPE = {
    "dropout": None,
    "continuing_subword_prefix": "",
    "end_of_word_suffix": "",
    "byte_fallback": False,
}


def tokenizer_keys(
    tokenizer: PreTrainedTokenizerBase | None, model: PreTrainedModel, vocab_size: int
) -> tuple[dict[str, Any], list[str]]:
    """Return the keys of a tokenizer, and what the user should know of it.

    The generation config names the tokens that end a text; rows of the embedding that the tokenizer lacks are filled
    up.

    Raises:
        UsageError: there is none, or llama.cpp would cut text in another way; the message says where.
    """
    if tokenizer is None:
        raise UsageError("a .gguf holds its tokenizer, and the model comes without one; save it with the model")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UsageError(f"{type(tokenizer).__name__} has no tokenizer.json, so its rules cannot be read")
    rules: dict[str, Any] = json.loads(backend.to_str())
    bpe = rules["model"]
    name = _pre_tokenizer(rules)
    if len(tokenizer) > vocab_size:
        raise UsageError(f"the tokenizer has {len(tokenizer)} tokens, the model {vocab_size} rows of embeddings")
    if not bpe["merges"]:
        raise UsageError("the tokenizer's BPE has no merges, and llama.cpp loads none without")
    words = {index: word for word, index in bpe["vocab"].items()}
    added = {token["id"]: token for token in rules["added_tokens"]}
    for token in added.values():
        if flag := next((flag for flag in ("single_word", "lstrip", "rstrip") if token[flag]), None):
            raise UsageError(f"the token {token['content']} has {flag} set, which a .gguf cannot say")
    tokens, kinds = [], []
    for index in range(vocab_size):
        if index in added:
            special = added[index]["special"]
            tokens.append(added[index]["content"])
            kinds.append(int(TokenType.CONTROL if special else TokenType.USER_DEFINED))
        else:
            tokens.append(words.get(index, f"[PAD{index}]"))
            kinds.append(int(TokenType.NORMAL if index in words else TokenType.UNUSED))
    first, last = _added_around(tokenizer)
    keys: dict[str, Any] = {
        Keys.Tokenizer.MODEL: "gpt2",
        Keys.Tokenizer.PRE: name,
        Keys.Tokenizer.LIST: tokens,
        Keys.Tokenizer.TOKEN_TYPE: kinds,
        Keys.Tokenizer.MERGES: [pair if isinstance(pair, str) else " ".join(pair) for pair in bpe["merges"]],
        Keys.Tokenizer.ADD_BOS: first,
        Keys.Tokenizer.ADD_EOS: last,
        **_special_tokens(tokenizer, model),
    }
    if isinstance(template := getattr(tokenizer, "chat_template", None), str):
        keys[Keys.Tokenizer.CHAT_TEMPLATE] = template
    notes = [f"Pre-tokenizer {name}."]
    if rules["normalizer"] is not None:
        notes.append("The tokenizer composes characters (NFC) first; llama.cpp takes text as it comes.")
    return keys, notes


def _pre_tokenizer(rules: dict[str, Any]) -> str:
    """Return llama.cpp's name of the rules."""
    bpe = rules["model"]
    if bpe["type"] != "BPE":
        raise UsageError(f"the tokenizer is a {bpe['type']}; a .gguf is written for byte-level BPE only")
    for name, wanted in PLAIN_BPE.items():
        if bpe.get(name, wanted) not in (wanted, None):
            raise UsageError(f"the tokenizer's BPE has {name} {bpe[name]!r}, which llama.cpp's has not")
    if rules["normalizer"] not in (None, {"type": "NFC"}):
        raise UsageError(f"the tokenizer normalises text ({rules['normalizer']['type']}), which llama.cpp does not")
    found = rules["pre_tokenizer"] or {"type": "none"}
    steps = found["pretokenizers"] if found["type"] == "Sequence" else [found]
    # Offsets are not ids.
    steps = [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]
    for name, wanted_steps, ignore_merges in PRE_TOKENIZERS:
        if steps == wanted_steps and bool(bpe.get("ignore_merges")) == ignore_merges:
            return name
    known = ", ".join(name for name, _, _ in PRE_TOKENIZERS)
    kinds = ", ".join(step["type"] for step in steps)
    raise UsageError(
        f"the tokenizer's pre-tokenizer ({kinds}) is none of those that are written for llama.cpp: {known}"
    )


def _added_around(tokenizer: Any) -> tuple[bool, bool]:
    """Whether a text gets the first and the last token."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    first = bool(whole) and whole[0] == tokenizer.bos_token_id and whole[0] != plain[0]
    last = bool(whole) and whole[-1] == tokenizer.eos_token_id and whole[-1] != plain[-1]
    around = [*([tokenizer.bos_token_id] if first else []), *plain, *([tokenizer.eos_token_id] if last else [])]
    if whole != around:
        raise UsageError(f"the tokenizer makes {whole} of 'a', and llama.cpp adds the first and last token only")
    return first, last


def _special_tokens(tokenizer: Any, model: PreTrainedModel) -> dict[str, int]:
    generation: Any = model.generation_config
    ends = getattr(generation, "eos_token_id", None)
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else next(iter(ends), None)
    others = [other for other in ends if other != end]
    if len(others) > 1:
        raise UsageError(f"the generation config has {len(ends)} tokens that end a text, a .gguf two")
    found = {
        Keys.Tokenizer.BOS_ID: tokenizer.bos_token_id,
        Keys.Tokenizer.EOS_ID: end,
        Keys.Tokenizer.EOT_ID: others[0] if others else None,
        Keys.Tokenizer.UNK_ID: tokenizer.unk_token_id,
        Keys.Tokenizer.PAD_ID: tokenizer.pad_token_id,
    }
    return {key: int(value) for key, value in found.items() if value is not None}
