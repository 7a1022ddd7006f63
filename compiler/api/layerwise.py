"""A checkpoint rewritten decoder layer by decoder layer: read, fitted, written, forgotten; gone on with if killed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
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
from attnedit.compiler.model_io.checkpoint_reader import CheckpointReader, weights_of
from attnedit.compiler.progress import Progress, silent
from attnedit.passes.gateswa.options import GateSWAOptions
from attnedit.passes.gateswa.rewrite import fit_site as fit_window
from attnedit.passes.mla.budget import Shape
from attnedit.passes.mla.fit import FitOptions
from attnedit.passes.mla.rewrite import exact_layer
from attnedit.passes.mla.rewrite import fit_site as fit_latent
from attnedit.targets.attention.kinds import AnyConfig, config_from_dict, config_of, config_to_dict, kind_of
from attnedit.targets.runtime.eager.shards import Shard, plan_shards, write_shard

STATE_DIRECTORY = "run"
"""In the output directory of an unfinished run."""
_STATE_FILE = "layers.safetensors"
_WINDOWS_FILE = "windows.safetensors"


@dataclass
class Rewritten:
    """What is known of the layers that are written.

    Attributes:
        done: shards written.
        configs: of the new attention, by the site's name.
        energy_kept, output_error: of the fits, by the site's name.
        seconds: spent on all shards.
        rule_seconds: of that on layers that were rewritten, by the kind of their new attention.
        hidden: the source's hidden states [N, T, D] before the next layer, of each length; None where they are not
            needed.
    """

    done: int = 0
    configs: dict[str, AnyConfig] = field(default_factory=dict)
    energy_kept: dict[str, float] = field(default_factory=dict)
    output_error: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    rule_seconds: dict[str, float] = field(default_factory=dict)
    hidden: list[Tensor] | None = None

    def save(self, directory: Path) -> None:
        """Replace what an earlier `save` left there."""
        values = {name: value for name, value in vars(self).items() if name != "hidden"}
        values["configs"] = {name: config_to_dict(config) for name, config in self.configs.items()}
        part = directory / f"{_STATE_FILE}.part"
        tensors = {f"hidden.{index}": part.cpu().contiguous() for index, part in enumerate(self.hidden or [])}
        save_file(tensors, part, metadata={"state": json.dumps(values)})
        os.replace(part, directory / _STATE_FILE)

    @classmethod
    def load(cls, directory: Path) -> Rewritten:
        """What `save` left; nothing yet where it did not.

        Raises:
            AttneditError: it cannot be read.
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
        values["configs"] = {name: config_from_dict(config) for name, config in values["configs"].items()}
        return cls(**values, hidden=hidden)


@dataclass(frozen=True)
class Job:
    """What every layer becomes.

    Attributes:
        windowed: sites that get a window.
        shapes: of those that become latent, by the site's name.
        windowing: form of the windows.
        options: of the latent fits.
        windows: calibration token ids [N, T] of each length T; None where nothing is fitted.
        seed: of the sampled queries.
    """

    windowed: list[AttentionSite]
    shapes: Mapping[str, Shape]
    windowing: GateSWAOptions | None
    options: FitOptions
    windows: list[Tensor] | None
    seed: int

    @property
    def fitted(self) -> set[str]:
        """Names of the sites that need data."""
        return {site.name for site in self.windowed} | {n for n, shape in self.shapes.items() if not shape.exact}

    @property
    def exact_stream(self) -> bool:
        """Whether hidden states are computed in the model's own dtype; see `FitOptions`."""
        return self.options.exact_stream or bool(self.windowed)


class LayerwiseRewrite:
    """Rewrites a model whose weights are on meta, from its reader into shards.

    Args:
        model: the source; left with its weights on meta.
        reader: of its checkpoint.
        sites: all its attention sites.
        job: what becomes of them.
        output: directory for the shards, with a run's state in it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        reader: CheckpointReader,
        sites: list[AttentionSite],
        job: Job,
        output: Path,
    ) -> None:
        self._model, self._reader, self._job = model, reader, job
        self._layers, self._by_layer = decoder_layers(model, sites)
        self.layers = next(name for name, module in model.named_modules() if module is self._layers)
        self.shards = plan_shards(model, reader.stored, self.layers)
        self._output, self._state = output, output / STATE_DIRECTORY
        fitted = [index for index, site in self._by_layer.items() if site.name in job.fitted]
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
            kind = kind_of(rewritten.configs[site.name]).name
            rewritten.rule_seconds[kind] = rewritten.rule_seconds.get(kind, 0.0) + seconds

    def _rewrite(self, shard: Shard, stream: Stream | None, rewritten: Rewritten) -> dict[str, Tensor]:
        """The weights to store, by their names in the result; the stream goes through the source's layer."""
        site = None if shard.layer is None else self._by_layer.get(shard.layer)
        graph: fx.GraphModule | None = None
        if shard.layer is None:
            pass
        elif stream is not None and shard.layer <= self._last_fitted:
            if site is None or not self._changes(site):
                stream.advance(shard.layer)
            else:
                with stream.inputs(shard.layer, site.name) as inputs:
                    graph = self._fit(site, inputs, rewritten)
        elif site is not None and self._changes(site):
            graph = exact_layer(self._model, site, self._job.shapes[site.name])
        values = self._model.state_dict()
        own = {name: values[name] for name in shard.weights}
        if graph is None or site is None:
            return own
        rewritten.configs[site.name] = config_of(graph)
        old = f"{site.name}."
        new = {f"{old}{name}": value for name, value in graph.state_dict().items()}
        return {**{name: value for name, value in own.items() if not name.startswith(old)}, **new}

    def _fit(self, site: AttentionSite, inputs: Iterator[AttentionInputs], rewritten: Rewritten) -> fx.GraphModule:
        model, job = self._model, self._job
        windows = job.windows
        assert windows is not None
        if job.windowing is not None and site in job.windowed:
            graph, window = fit_window(model, model, site, inputs, job.windowing, windows, job.seed)
            rewritten.output_error[site.name] = window.output_error
            return graph
        shape = job.shapes[site.name]
        graph, fit, _ = fit_latent(model, model, site, inputs, shape, job.options, windows, job.seed)
        if fit is not None:
            rewritten.energy_kept[site.name], rewritten.output_error[site.name] = fit.energy_kept, fit.output_error
        return graph

    def _changes(self, site: AttentionSite) -> bool:
        return site.name in self._job.shapes or site in self._job.windowed

    def _enter(self, index: int, hidden: list[Tensor] | None) -> Stream:
        """The stream before layer `index`, where it has the hidden states known from an earlier run."""
        assert self._job.windows is not None
        base = self._model.base_model
        start = next(f"{name}." if name else "" for name, module in self._model.named_modules() if module is base)
        held = [name for name in self._reader.stored if name.startswith(start)]
        outside = [name for name in held if not name.startswith(f"{self.layers}.")]
        with self._reader.resident([*outside, *weights_of(self._model, f"{self.layers}.0")]):
            stream = Stream(self._model, self._layers, self._job.windows, exact=self._job.exact_stream)
        if hidden is not None:
            stream.skip_to(index, hidden)
        return stream

    def _keep_windows(self) -> None:
        """Go on with the same calibration data only."""
        windows, file = self._job.windows, self._state / _WINDOWS_FILE
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
        part = file.with_suffix(".part")
        save_file(named, part)
        os.replace(part, file)
