"""docs/families.md from what benchmarks/families.py found."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

import transformers

REASONS = {
    "is an encoder-decoder": "Encoder-decoders; only decoders are converted:",
    "no module runs softmax attention": "No softmax attention was found in the small model: its layers are "
    "state-space, linear, recurrent or hashed attention:",
    "passes indices": "Sparse attention: an indexer of the model's own chooses the keys that each query sees:",
    "passes position_bias": "A bias made inside the layer is added to the logits of its attention:",
    "do not come from one input": "Queries, keys and values come in apart, as in cross-attention, so that nothing in "
    "the layer makes all that is cached:",
    "values depend on|expected the hidden states alone": "Keys or values are made of more than the layer's own hidden "
    "states, such as compressed or convolved earlier tokens:",
    "runs attention more than once|runs more than once": "One module attends more than once over a forward, so that it "
    "has no one cache:",
    "mask is computed inside": "The attention computes its own mask from what it attends to:",
    "hidden states change between": "What stands between the layers changes their hidden states:",
    "its caller says which layer": "Several layers share one attention module, which is told which layer it is:",
    "no module around it is given a cache": "The attention is written out in the module and keeps no cache that could "
    "become smaller:",
    "no linear module takes all of its output": "The output of the attention goes through experts instead of one "
    "projection:",
    "neither causal nor a sliding window": "Masks other than causal and sliding ones, such as chunks:",
    "use_bidirectional_attention": "Its attention looks both ways under some of its implementations:",
    "DynamicCache": "It keeps a cache class of its own:",
    "torch.export failed": "torch.export cannot trace it, since its control flow depends on data:",
    "baked in": "It computes in a dtype that its code names, whatever the model's own is:",
    "works for the traced size": "Its graph holds for the traced sizes alone:",
    "a forward on 2 x 11 tokens failed": "It does not run on text alone, or a small configuration does not run at all:",
    "the configuration of": "Its configuration gives a size that no attention can have:",
}
"""What refusals mean, by a pattern in their text; the first that is found counts."""


def outcome(row: dict[str, str]) -> str:
    """One word for a row."""
    if "fails" in row:
        return "fails"
    if "refused" in row:
        return "refused"
    return "converted" if "GateSWA" in row else "latent already"


def page(rows: dict[str, dict[str, str]], whole: dict[str, dict[str, str]]) -> str:
    """Write the page: language models, then models with a text tower."""
    counts = Counter(outcome(row) for row in rows.values())
    lines = [
        "# Families",
        "",
        f"Every class of `AutoModelForCausalLM` in transformers {transformers.__version__}, by program, as a tiny",
        "model with random weights; written by",
        "`python benchmarks/families.py --rows docs/data/families.json --output docs/families.md`.",
        "",
        f"{len(rows)} classes: " + ", ".join(f"{count} {word}" for word, count in counts.most_common()) + ".",
        "",
        "- sites: attention modules that were found. identity: logits when each is replaced by its own graph;",
        "  families that write their attention out, past transformers' attention interface, agree to rounding, and",
        "  so do those that apply attention sinks as a factor on the output (Granite SWA).",
        "- MLA 1: deviation at the whole budget, of the largest logit. MLA 1/2, GateSWA: generates for a padded batch.",
        "- positions stay in the keys: what the model does with positions is no rotary embedding that can be taken",
        "  out, so keys are compressed as they are cached.",
        "- fails: a small configuration could not be made or run by this program, so nothing is known of the class.",
        "",
        "Only softmax attention is converted: state-space and linear-attention layers of hybrids stay as they are.",
        "Random small configurations of common families are compiled by `tests/api/test_random_configs.py`: 50 in",
        "`make test-long`, others with `ATTNEDIT_EXAMPLES=500 pytest -m long tests/api/test_random_configs.py`.",
        "",
        *_HEAD,
        *_cells(rows),
        "",
        "## Models with a text tower",
        "",
        "Classes of `AutoModelForMultimodalLM`, whole, on text: what is converted is the text tower, in place.",
        "With images, Qwen2-VL, Qwen2.5-VL, Qwen3-VL, LLaVA and Gemma 3 are held to their sources by",
        "`tests/api/test_vision.py` ([guide](user-guide.md#vision-language-models)).",
        "",
        *_HEAD,
        *_cells(whole),
        "",
        "## Why a class is refused",
        "",
        *_reasons({**rows, **whole}),
    ]
    return "\n".join(lines) + "\n"


def _reasons(rows: dict[str, dict[str, str]]) -> Iterator[str]:
    """One sentence for each reason, with the classes that it holds for."""
    found: dict[str, list[str]] = {}
    for name, row in rows.items():
        if "refused" in row:
            sentence = next((says for pattern, says in REASONS.items() if re.search(pattern, row["refused"])), None)
            if sentence is None:
                raise SystemExit(f"{name}: write down in REASONS what this means: {row['refused']}")
            found.setdefault(sentence, []).append(name.split("`")[1])
    for sentence in dict.fromkeys(REASONS.values()):
        if sentence in found:
            yield f"- {sentence} {', '.join(f'`{name}`' for name in found[sentence])}."


_HEAD = ("| model | sites | identity | MLA 1 | MLA 1/2 | GateSWA | |", "|---|---|---|---|---|---|---|")


def _cells(rows: dict[str, dict[str, str]]) -> Iterator[str]:
    for name, row in rows.items():
        reason = row.get("refused") or (f"fails: {row['fails']}" if "fails" in row else row.get("note", ""))
        reason = re.sub(r"\s+", " ", reason).replace("|", "\\|")
        cells = [row.get(column, "") for column in ("sites", "identity", "MLA 1", "MLA 1/2", "GateSWA")]
        yield f"| {' | '.join([name, *cells, reason])} |"
