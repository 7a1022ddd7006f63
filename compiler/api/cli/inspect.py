"""``attnedit inspect``: what would match, from a configuration alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from transformers import PreTrainedModel

from attnedit.cli.export import check_options
from attnedit.cli.flags import takes
from attnedit.cli.terminal import (
    JsonOption,
    ModelArgument,
    ProgressBars,
    print_json,
    show,
)
from attnedit.compiler.capture.capture import capture
from attnedit.compiler.capture.sites import AttentionSite, by_reason, left_of
from attnedit.compiler.data.token_windows import context_length
from attnedit.compiler.errors import UsageError
from attnedit.compiler.model_io.models import load_config_only
from attnedit.compiler.progress import stage
from attnedit.compiler.reporting.report import ranges
from attnedit.options import SourceOptions
from attnedit.planning import check_fresh
from attnedit.result import find_inspection


@takes(SourceOptions, without=("device", "dtype", "dequantize", "allow_pickle"))
def inspect(
    model: ModelArgument,
    runtime: Annotated[
        str | None, typer.Option(help="Show what this runtime would make of each attention: npu.")
    ] = None,
    soc: Annotated[str | None, typer.Option(help="npu: 910b, 910_93 or 310p.")] = None,
    *,
    json: JsonOption = False,
    **source: Any,
) -> None:
    """Show the attention sites of a model, what was read off their graphs, and what their cache costs."""
    if runtime is not None:
        return _inspect_for(runtime, model, {} if soc is None else {"soc": soc}, source, json)
    if soc is not None:
        raise UsageError("--soc belongs to --runtime npu; leave it out")
    with ProgressBars() as progress, stage("capture", progress):
        meta = load_config_only(model, **source)
        check_fresh(meta, model)
        facts = describe(meta, capture(meta))
    if json:
        print_json({"model": model, **facts})
        return
    table = Table(title=f"{model} ({facts['model_type']}): {facts['parameters']:,} parameters")
    for column in ("layers", "heads", "kv heads", "head dim", "rope", "norms", "window", "other", "values per token"):
        table.add_column(column)
    for kind in facts["kinds"]:
        table.add_row(*_row(kind))
    show(table)
    for line in by_reason(facts["left"].items()):
        show(f"stays as it is: {line}")
    show(
        f"KV cache at {facts['context_length']:,} tokens: {facts['kv_values_per_token_layer']:g} values per token "
        f"and layer, {facts['kv_bytes_per_token']:,.0f} bytes per token ({facts['dtype']})"
    )


def _inspect_for(name: str, model: str, options: dict[str, Any], source: dict[str, Any], json: bool) -> None:
    """Show what a runtime would make of a model, rewritten or not."""
    found = find_inspection(name)
    check_options(name, found.inspect, options)
    with ProgressBars() as progress, stage("inspect", progress):
        facts = found.inspect(load_config_only(model, **source), **options)
    if json:
        print_json({"model": model, "runtime": name, **facts})
    else:
        show(found.table(facts))


def describe(model: PreTrainedModel, sites: Sequence[AttentionSite]) -> dict[str, Any]:
    """The facts that ``inspect --json`` prints, sites grouped by kind."""
    length = context_length(model)
    config = model.config.get_text_config(decoder=True)
    declared = getattr(config, "dtype", None)
    dtype = declared if isinstance(declared, torch.dtype) else torch.float32
    kinds: dict[str, list[AttentionSite]] = defaultdict(list)
    for site in sites:
        kinds[site.kind].append(site)
    # Layers may share one slot of the cache: it counts once.
    values = {site.layer_idx: _values(site) * min(1.0, (site.window or length) / length) for site in sites}
    return {
        "model_type": model.config.model_type,
        "parameters": model.num_parameters(),
        "context_length": length,
        "dtype": str(dtype).removeprefix("torch."),
        "sites": len(sites),
        "kv_values_per_token_layer": sum(values.values()) / int(config.num_hidden_layers),
        "kv_bytes_per_token": sum(values.values()) * dtype.itemsize,
        "kinds": [_facts(group) for group in kinds.values()],
        "left": left_of(sites),
    }


def _values(site: AttentionSite) -> int:
    return site.num_key_value_heads * (site.head_dim + site.v_head_dim)


def _facts(sites: Sequence[AttentionSite]) -> dict[str, Any]:
    site = sites[0]
    return {
        "names": [each.name for each in sites],
        "layers": [each.layer_idx for each in sites],
        "num_attention_heads": site.num_attention_heads,
        "num_key_value_heads": site.num_key_value_heads,
        "head_dim": site.head_dim,
        "v_head_dim": site.v_head_dim,
        "scale": site.scale,
        "rope": None if site.rope is None else {"style": site.rope.style, "frequencies": len(site.rope.pairs)},
        "query_norm": site.query_norm,
        "key_norm": site.key_norm,
        "sliding_window": site.window,
        "softcap": site.softcap,
        "sinks": site.sinks is not None,
        "output_gate": site.output_gate,
        "linear_kv": site.linear_kv,
        "already_mla": site.already_mla,
        "kv_values_per_token": _values(site),
    }


def _row(kind: dict[str, Any]) -> list[str]:
    rope, dim, v_dim = kind["rope"], kind["head_dim"], kind["v_head_dim"]
    norms = ", ".join(f"{part} {kind[f'{part}_norm']}" for part in ("query", "key") if kind[f"{part}_norm"])
    other = [name for name in ("sinks", "output_gate", "already_mla") if kind[name]]
    if kind["softcap"] is not None:
        other.append(f"softcap {kind['softcap']:g}")
    return [
        ranges(kind["layers"]),
        str(kind["num_attention_heads"]),
        str(kind["num_key_value_heads"]),
        f"{dim}" if dim == v_dim else f"{dim}/{v_dim}",
        "-" if rope is None else f"{rope['style']}, {2 * rope['frequencies']} of {dim}",
        norms or "-",
        "-" if kind["sliding_window"] is None else str(kind["sliding_window"]),
        ", ".join(other) or "-",
        str(kind["kv_values_per_token"]),
    ]
