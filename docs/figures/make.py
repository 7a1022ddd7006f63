"""Drawings, charts and tables of the pages, made anew: ``python docs/figures/make.py``."""

from __future__ import annotations

from pathlib import Path

import torch
from cells import DOCS
from charts import charts
from concepts import concepts
from page_tables import PAGES, filled
from transformers import Qwen3Config, Qwen3ForCausalLM

import attnedit
from attnedit.compiler.capture.capture import capture, graph_module
from attnedit.compiler.reporting.graph_svg import graph_svg

HERE = Path(__file__).parent
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}


def drawings() -> dict[str, str]:
    """Attention modules before and after: SVG by file name."""
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**SHAPE)).eval()
    site = capture(model)[0]
    found = {"source.svg": graph_svg(graph_module(model, site).graph, "Qwen3: source")}
    for target, options in (("mla", {"kv_budget": 0.5}), ("gateswa", {"full_layers": [1], "window": 16})):
        data = {"calibration": torch.randint(64, (2, 64)), "alternations": 0}
        result = attnedit.compile(model, target, **data, **options)  # type: ignore[arg-type]
        graph = result.model.get_submodule(site.name).graph
        found[f"{target}.svg"] = graph_svg(graph, f"Qwen3: {target}")  # type: ignore[arg-type]
    return found


if __name__ == "__main__":
    for name, text in (drawings() | charts() | concepts()).items():
        (HERE / name).write_text(text + "\n", encoding="utf-8")
    for page in PAGES:
        (DOCS / page).write_text(filled(page), encoding="utf-8")
