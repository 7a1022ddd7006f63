"""Compile random configurations of random families, half of them with outlier activations: none may fail.

    python tests/support/random_configurations.py --count 1000 --seed 0

Cases of one shape run one after another: what capture traced for the first is found again for the others, which take a
fifth of the time. Several processes share the work by families: --piece 0/2, --piece 1/2.

A case passes if the result computes finite numbers, or if it is refused in one line for a reason of usage. One JSON
line is printed for each failure, with what repeats it, and one for the sum, with the refusals and their reasons.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import traceback
from collections import Counter
from typing import Any

import torch
from families import FAMILIES, build
from torch import Tensor
from transformers import PreTrainedModel

import attnedit
from attnedit.compiler.errors import UsageError

LARGE = 1000.0
CONTEXT = 96
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "query", "key", "value", "qkv", "c_attn")
"""Parts of the names that families give to projections of queries, keys and values."""
FAMILY_NAMES = [name for name, family in FAMILIES.items() if not family.mla]


def draw(seed: int) -> dict[str, Any]:
    """One case: a family, arguments of `attnedit.compile`, and what is planted."""
    choose = random.Random(seed)
    target = choose.choice(["mla", "mla", "gateswa", "gateswa+mla"])
    arguments: dict[str, Any] = {"target": target, "seed": choose.randrange(100)}
    arguments["alternations"] = choose.choice([0, 1, 2])
    if target == "mla" or choose.random() < 0.3:
        arguments["kv_budget"] = round(choose.uniform(0.1, 1.0), 3)
    if target != "mla":
        arguments["window"] = choose.randint(1, 20)
        arguments["sinks"] = choose.choice(["none", "keep:1", "keep:4", "logit", "logit,value", "logit,value,keep:2"])
        arguments["gate"] = choose.choice([None, "none", "head", "element"])
        if "kv_budget" not in arguments:
            arguments["full_layers"] = choose.choice([None, 0, 1])
    elif choose.random() < 0.2:
        arguments["allocation"] = "loss"
    family = choose.choice(FAMILY_NAMES)
    grouped = FAMILIES[family].heads == (4, 2)  # the others have as many key/value heads as they must
    plants = ["channels", "biases", "token", "dead head", "constant keys"]
    return {
        "seed": seed,
        "family": family,
        "options": {"num_key_value_heads": choose.choice([1, 4])} if grouped and choose.random() < 0.3 else {},
        "arguments": arguments,
        "windows": choose.choice([1, 2, 5]),
        "length": choose.randint(24, CONTEXT),
        "plant": choose.choice(plants) if seed % 2 else None,
    }


@torch.no_grad()
def plant(model: PreTrainedModel, what: str | None, seed: int) -> None:
    """Give a model outlier activations: in projections of queries, keys and values, or in the embedding of a token."""
    generator = torch.Generator().manual_seed(seed)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float32).to(like)

    if what == "token":
        embedding: Any = model.get_input_embeddings()
        embedding.weight[5] *= LARGE
    for name, value in model.named_parameters():
        place = name.rsplit(".", 2)
        if len(place) < 2 or not any(part in place[-2] for part in PROJECTIONS):
            continue
        if what == "channels" and value.dim() == 2:
            value[int(torch.randint(len(value), (), generator=generator))] *= LARGE
        elif what == "biases" and value.dim() == 1:
            value += LARGE * noise(value)
        elif what == "dead head" and value.dim() == 2:
            value[: max(1, len(value) // 4)] = 0
        elif what == "constant keys" and place[-2] in ("k_proj", "key"):
            value *= 0.0 if value.dim() == 2 else 1.0


def run(case: dict[str, Any]) -> tuple[str | None, str | None]:
    """Why a case failed, and why it was refused; None where it was not."""
    try:
        model = build(case["family"], seed=case["seed"], **case["options"])
        plant(model, case["plant"], case["seed"])
        generator = torch.Generator().manual_seed(case["seed"])
        data = torch.randint(3, 64, (case["windows"], case["length"]), generator=generator)
        result = attnedit.compile(model, calibration=data, **case["arguments"])
        ids = data[:1, :20]
        with torch.no_grad():
            found = result.model(ids).logits
        if not bool(torch.isfinite(found).all()):
            return "logits are not finite", None
        bad = [row.name for row in result.report.layers if row.output_error is not None and not row.output_error < 1e6]
        if bad:
            return f"the error of {bad[0]} is out of bounds", None
        if case["seed"] % 10 == 0:
            with tempfile.TemporaryDirectory() as directory, torch.no_grad():
                again = attnedit.load(result.save(f"{directory}/out")).model(ids).logits
            if not torch.allclose(again, found, rtol=1e-4, atol=1e-4):
                return "the saved result computes something else", None
    except UsageError as error:
        return (None if "\n" not in str(error) else f"several lines: {error}"), str(error)
    except Exception as error:  # what this is for
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} at {where.filename}:{where.lineno}: {error}"[:500], None
    return None, None


def main() -> int:
    """Run the cases and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    parser.add_argument("--piece", default="0/1", help="every n-th family, from the i-th on: i/n")
    arguments = parser.parse_args()
    index, pieces = map(int, arguments.piece.split("/"))
    names = set(FAMILY_NAMES[index::pieces])
    cases = [draw(seed) for seed in range(arguments.seed, arguments.seed + arguments.count)]
    cases = [case for case in cases if case["family"] in names]
    failures = 0
    refused: Counter[str] = Counter()
    for case in sorted(cases, key=lambda case: (case["family"], str(case["options"]))):
        reason, refusal = run(case)
        if refusal is not None:
            refused[refusal] += 1
        if reason is not None:
            failures += 1
            print(json.dumps({**case, "failed": reason}), flush=True)
        print(case["family"], case["seed"], file=sys.stderr, flush=True)
    print(json.dumps({"cases": len(cases), "failures": failures, "refused": refused.total(), "reasons": refused}))
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
