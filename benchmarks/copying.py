"""Where a result loses: on tokens that continue a pair seen before in the window, and on all others.

    python benchmarks/copying.py smollm2 trained --text eval.txt --text tech.txt

A token counts as seen if it follows the same token as it did further up: what attention can copy. Prints a table in
Markdown: for every text the share of such tokens, and the rise of the loss over the source, in nats, on both kinds.
"""

from __future__ import annotations

import argparse
import itertools

import torch
from torch import Tensor

from attnedit.compiler.data.token_windows import text_tokens
from attnedit.compiler.evaluation.evaluate import window_losses
from attnedit.compiler.model_io.models import load_source


def seen_before(window: Tensor) -> Tensor:
    """Which tokens [T - 1], from the second on, continue a pair that came earlier; token ids [T]."""
    pairs: set[tuple[int, int]] = set()
    found = []
    ids = window.tolist()
    for pair in itertools.pairwise(ids):
        found.append(pair in pairs)
        pairs.add(pair)
    return torch.tensor(found)


def main() -> None:
    """Compare a result with its source on some texts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("result", help="directory")
    parser.add_argument("--text", action="append", required=True, help="several times")
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    source = load_source(options.source, device=options.device)
    result = load_source(options.result, device=options.device)
    print("| text | seen before | rise there | rise elsewhere |\n|---|---|---|---|")
    for text in options.text:
        tokens = text_tokens(text, source.tokenizer).flatten()
        count = min(options.windows, tokens.numel() // options.seq_len)
        windows = tokens[: count * options.seq_len].view(count, -1)
        seen = torch.stack([seen_before(window) for window in windows])
        rise = window_losses(result.model, windows) - window_losses(source.model, windows)
        there, elsewhere = float(rise[seen].mean()), float(rise[~seen].mean())
        print(f"| {text} | {float(seen.float().mean()):.1%} | {there:.3f} | {elsewhere:.3f} |", flush=True)


if __name__ == "__main__":
    main()
