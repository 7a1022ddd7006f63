"""What each step of the closed form of latent attention takes and brings, on some layers.

    python benchmarks/fit_rounds.py smollm2 --calibration calib.txt --layers 4,8 --budgets 0.5,0.25 --iterations 4,8

A quarter of the calibration windows is held out. Errors are of the attention output's energy. Seconds are those of a
step's three parts: the logits that are to be met, the refit of one side by conjugate gradients, the output regression.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from attnedit.compiler.capture.capture import as_captured, capture
from attnedit.compiler.capture.sites import AttentionSite
from attnedit.compiler.data.calibration_windows import calibration_windows
from attnedit.compiler.execution.stream import AttentionInputs, stream
from attnedit.compiler.model_io.models import load_source
from attnedit.passes.budget import source_values
from attnedit.passes.fit_options import FitOptions
from attnedit.passes.mla.initialise import Split, analytic, mix_components
from attnedit.passes.mla.least_squares import logit_target, refit_latent, refit_output, refit_query
from attnedit.passes.mla.shapes import shape_for
from attnedit.passes.mla.weights import output_error
from attnedit.passes.sample import LayerSample
from attnedit.passes.site_sample import queries_for, take_samples

SIDES = (refit_query, refit_latent)


def samples_of(
    model: PreTrainedModel, sites: Sequence[AttentionSite], windows: list[Tensor], queries: int
) -> dict[str, list[LayerSample]]:
    """What these sites show on the windows, by name."""
    found: dict[str, list[LayerSample]] = {}

    def visit(site: AttentionSite, inputs: Iterator[AttentionInputs]) -> None:
        found[site.name] = take_samples(model, site, inputs, queries_for(model, windows, queries), 0)

    stream(model, list(sites), windows, visit, stage="samples")
    return found


@torch.no_grad()
def rounds(
    site: AttentionSite, budget: float, iterations: int, fit: list[LayerSample], held: list[LayerSample]
) -> list[dict[str, float | str]]:
    """The steps of two alternations on one layer."""
    shape = shape_for(site, int(budget * source_values(site)))
    components = mix_components(fit, shape.fold, shape.columns) if shape.slots else None
    factors, _ = analytic(fit, Split.of(fit, components, shape.slots), shape.rank)
    factors, error = refit_output(fit, factors)
    found: list[dict[str, float | str]] = [{"step": "start", "fit": error, "held": output_error(held, factors)}]
    for turn, side in enumerate(SIDES * 2):
        start = time.perf_counter()
        target = logit_target(fit, factors if turn else None)
        targeted = time.perf_counter()
        factors = side(fit, factors, target, iterations)
        refitted = time.perf_counter()
        factors, error = refit_output(fit, factors)
        seconds = {"target": targeted - start, "side": refitted - targeted, "output": time.perf_counter() - refitted}
        found.append({"step": side.__name__, "fit": error, "held": output_error(held, factors), **seconds})
    return found


def main() -> None:
    """Print a line of JSON for each step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--layers", default="4,8")
    parser.add_argument("--budgets", default="0.5,0.25")
    parser.add_argument("--iterations", default="4,8")
    parser.add_argument("--calibration-tokens", type=int)
    options = parser.parse_args()
    source = load_source(options.model)
    model = source.model
    windows = calibration_windows(options.calibration, source.tokenizer, model, tokens=options.calibration_tokens).parts
    cut = [max(1, len(part) * 3 // 4) for part in windows]
    wanted = {int(layer) for layer in options.layers.split(",")}
    every = capture(model)
    sites = [site for site in every if site.layer_idx in wanted]
    queries = FitOptions.output_queries
    with as_captured(model, every):
        fit = samples_of(model, sites, [part[:end] for part, end in zip(windows, cut, strict=True)], queries * 3 // 4)
        held = samples_of(model, sites, [part[end:] for part, end in zip(windows, cut, strict=True)], queries // 4)
    for site in sites:
        for budget in map(float, options.budgets.split(",")):
            for iterations in map(int, options.iterations.split(",")):
                case = {"layer": site.layer_idx, "budget": budget, "iterations": iterations}
                for step in rounds(site, budget, iterations, fit[site.name], held[site.name]):
                    rounded = {
                        name: value if isinstance(value, str) else round(value, 5) for name, value in step.items()
                    }
                    print(json.dumps({**case, **rounded}), flush=True)


if __name__ == "__main__":
    main()
