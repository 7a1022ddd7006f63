"""A checkpoint rewritten decoder layer by decoder layer: read, fitted, written, forgotten; gone on with if killed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, fx
from transformers import PreTrainedModel

from attnedit.compiler.capture.sites import AttentionSite
from attnedit.compiler.compatibility.transformers_names import set_conversions
from attnedit.compiler.errors import AttneditError, UsageError
from attnedit.compiler.execution.model_inputs import given_digest
from attnedit.compiler.execution.stream import AttentionInputs, Stream, decoder_layers
from attnedit.compiler.files import replaced
from attnedit.compiler.formats import FORMAT_KEY, check_format
from attnedit.compiler.model_io.checkpoint_reader import CheckpointReader, weights_of
from attnedit.compiler.progress import Progress, silent
from attnedit.passes.questions import Claim, SiteWork
from attnedit.passes.target import AnyTarget
from attnedit.targets.attention.config import SiteConfig
from attnedit.targets.attention.kinds import config_from_dict, config_of, config_to_dict
from attnedit.targets.runtime.eager.shards import Shard, plan_shards, write_shard

STATE_DIRECTORY = "run"
"""In the output directory of an unfinished run."""
_STATE_FILE = "layers.safetensors"
FORMAT_VERSION = 1
"""Of that file."""
_WINDOWS_FILE = "windows.safetensors"


@dataclass
class Rewritten:
    """What is known of the layers that are written.

    Attributes:
        done: shards written.
        configs: of the new attention, by the site's name.
        energy_kept, output_error, contracts: of the fits, by the site's name.
        seconds: spent on all shards.
        rule_seconds: of that on layers that were rewritten, by target.
        hidden: the source's hidden states [N, T, D] before the next layer, of each length; None where they are not
            needed.
    """

    done: int = 0
    configs: dict[str, SiteConfig] = field(default_factory=dict)
    energy_kept: dict[str, float] = field(default_factory=dict)
    output_error: dict[str, float] = field(default_factory=dict)
    contracts: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    rule_seconds: dict[str, float] = field(default_factory=dict)
    hidden: list[Tensor] | None = None

    def save(self, directory: Path) -> None:
        """Replace what an earlier `save` left there."""
        values = {name: value for name, value in vars(self).items() if name != "hidden"}
        values["configs"] = {name: config_to_dict(config) for name, config in self.configs.items()}
        tensors = {f"hidden.{index}": part.cpu().contiguous() for index, part in enumerate(self.hidden or [])}
        with replaced(directory / _STATE_FILE) as part:
            save_file(tensors, part, metadata={"state": json.dumps({FORMAT_KEY: FORMAT_VERSION, **values})})

    @classmethod
    def load(cls, directory: Path) -> Rewritten:
        """What `save` left; nothing yet where it did not.

        Raises:
            AttneditError: it cannot be read, or has another format.
        """
        file = directory / _STATE_FILE
        if not file.exists():
            return cls()
        try:
            with safe_open(file, framework="pt") as content:
                values = json.loads((content.metadata() or {})["state"])
                count = len(list(content.keys()))
                hidden = [content.get_tensor(f"hidden.{index}") for index in range(count)] or None
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise AttneditError(f"{file} cannot be read ({type(error).__name__}); start again") from error
        check_format(values, FORMAT_VERSION, str(file))
        values.pop(FORMAT_KEY, None)
        values["configs"] = {name: config_from_dict(config) for name, config in values["configs"].items()}
        return cls(**values, hidden=hidden)


class LayerwiseRewrite:
    """Rewrites a model whose weights are on meta, from its reader into shards.

    Args:
        model: the source; left with its weights on meta.
        reader: of its checkpoint.
        sites: all its attention sites.
        claims: what becomes of them, by target.
        windows: calibration token ids [N, T] of each length T; None where nothing is fitted.
        seed: of the sampled queries.
        output: directory for the shards, with a run's state in it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        reader: CheckpointReader,
        sites: list[AttentionSite],
        claims: list[tuple[AnyTarget, Claim]],
        windows: list[Tensor] | None,
        seed: int,
        output: Path,
    ) -> None:
        self._model, self._reader, self._windows, self._seed = model, reader, windows, seed
        self._changes = {name: (target, shape) for target, claim in claims for name, shape in claim.shapes.items()}
        self._exact_stream = any(target.exact_stream for target, claim in claims if claim.shapes)
        self._layers, self._by_layer = decoder_layers(model, sites)
        self.layers = next(name for name, module in model.named_modules() if module is self._layers)
        self.shards = plan_shards(model, reader.stored, self.layers)
        self._output, self._state = output, output / STATE_DIRECTORY
        lossy = {name for name, (_, shape) in self._changes.items() if not shape.exact}
        fitted = [index for index, site in self._by_layer.items() if site.name in lossy]
        self._last_fitted = max(fitted, default=-1)

    def run(self, progress: Progress | None = None) -> Rewritten:
        """Write all shards that are not there yet.

        Raises:
            UsageError: the checkpoint is damaged, or calibration data is not what the run began with.
            CaptureError: a layer cannot be rewritten.
        """
        report = progress or silent
        self._state.mkdir(exist_ok=True)
        self._keep_windows()
        rewritten = Rewritten.load(self._state)
        set_conversions(self._model, self._reader.conversions)  # for writing shards
        stream: Stream | None = None
        report("rewrite layers", rewritten.done, len(self.shards))
        for shard in self.shards[rewritten.done :]:
            start = perf_counter()
            if stream is None and shard.layer is not None and shard.layer <= self._last_fitted:
                stream = self._enter(shard.layer, rewritten.hidden)
            with self._reader.resident(shard.weights):
                # No name for the weights: it would keep them until the next layer is there too.
                places = self._output / shard.file, self._state / shard.file
                write_shard(self._model, self._rewrite(shard, stream, rewritten), *places)
            rewritten.done += 1
            # Where no later layer is fitted, nothing needs the hidden states any more.
            needed = stream is not None and shard.layer is not None and shard.layer < self._last_fitted
            rewritten.hidden = stream.hidden if stream is not None and needed else None
            self._count(perf_counter() - start, shard, rewritten)
            rewritten.save(self._state)
            rewritten.hidden = None
            report("rewrite layers", rewritten.done, len(self.shards))
        return rewritten

    def _count(self, seconds: float, shard: Shard, rewritten: Rewritten) -> None:
        rewritten.seconds += seconds
        site = None if shard.layer is None else self._by_layer.get(shard.layer)
        if site is not None and site.name in rewritten.configs:
            name = self._changes[site.name][0].name
            rewritten.rule_seconds[name] = rewritten.rule_seconds.get(name, 0.0) + seconds

    def _rewrite(self, shard: Shard, stream: Stream | None, rewritten: Rewritten) -> dict[str, Tensor]:
        """The weights to store, by their names in the result; the stream goes through the source's layer."""
        site = None if shard.layer is None else self._by_layer.get(shard.layer)
        graph: fx.GraphModule | None = None
        if shard.layer is None:
            pass
        elif stream is not None and shard.layer <= self._last_fitted:
            if site is None or site.name not in self._changes:
                stream.advance(shard.layer)
            else:
                with stream.inputs(shard.layer, site.name) as inputs:
                    graph = self._fit(site, inputs, rewritten)
        elif site is not None and site.name in self._changes:
            graph = self._fit(site, iter(()), rewritten)
        values = self._model.state_dict()
        own = {name: values[name] for name in shard.weights}
        if graph is None or site is None:
            return own
        rewritten.configs[site.name] = config_of(graph)
        old = f"{site.name}."
        new = {f"{old}{name}": value for name, value in graph.state_dict().items()}
        return {**{name: value for name, value in own.items() if not name.startswith(old)}, **new}

    def _fit(self, site: AttentionSite, inputs: Iterator[AttentionInputs], rewritten: Rewritten) -> fx.GraphModule:
        target, shape = self._changes[site.name]
        work = SiteWork(self._model, self._model, site, inputs, self._windows or (), self._seed)
        fit = target.fit_site(work, shape)
        found = ((rewritten.energy_kept, fit.energy_kept), (rewritten.output_error, fit.output_error))
        for figures, figure in found:
            if figure is not None:
                figures[site.name] = figure
        rewritten.contracts[site.name] = fit.contract.kind
        return fit.graph

    def _enter(self, index: int, hidden: list[Tensor] | None) -> Stream:
        """The stream before layer `index`, where it has the hidden states known from an earlier run."""
        assert self._windows is not None
        base = self._model.base_model
        start = next(f"{name}." if name else "" for name, module in self._model.named_modules() if module is base)
        held = [name for name in self._reader.stored if name.startswith(start)]
        outside = [name for name in held if not name.startswith(f"{self.layers}.")]
        with self._reader.resident([*outside, *weights_of(self._model, f"{self.layers}.0")]):
            stream = Stream(self._model, self._layers, self._windows, exact=self._exact_stream)
        if hidden is not None:
            stream.skip_to(index, hidden)
        return stream

    def _keep_windows(self) -> None:
        """Go on with the same calibration data only."""
        windows, file = self._windows, self._state / _WINDOWS_FILE
        if windows is None:
            return
        named = {f"windows.{index}": part.contiguous() for index, part in enumerate(windows)}
        if images := given_digest():
            named["images"] = torch.tensor(list(images), dtype=torch.uint8)
        if file.exists():
            with safe_open(file, framework="pt") as content:
                there = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
                if there.keys() != named.keys() or any(not torch.equal(there[name], named[name]) for name in named):
                    raise UsageError(
                        f"the calibration data is not what the run in {self._output} began with; "
                        "give that, or --overwrite"
                    )
            return
        with replaced(file) as part:
            save_file(named, part)
