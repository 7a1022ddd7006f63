"""Attention sites of a class of models: captured on one that is made for that alone."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import PreTrainedConfig, PreTrainedModel

from attnedit.compiler.capture.capture import capture
from attnedit.compiler.capture.sites import AttentionSite
from attnedit.compiler.compatibility.transformers_names import set_implementations
from attnedit.compiler.errors import CaptureError

_SITES: OrderedDict[tuple[type[PreTrainedModel], str], Mapping[str, AttentionSite]] = OrderedDict()
_SITES_KEPT = 4


def sites_of_source(model_class: type[PreTrainedModel], source: Any) -> Mapping[str, AttentionSite]:
    """Attention sites of a source, captured on a skeleton without weights (seconds), remembered for a few models.

    Implementations are set in the configuration, so it must be a copy.
    """
    # No part of a site; without them models that differ in nothing else share their sites.
    source.name_or_path, source.dtype, source.architectures = "", None, None
    # Other implementations may want a device or a dtype: grouped_mm on meta takes bfloat16 only.
    set_implementations(source, "eager", "batched_mm")
    key = (model_class, source.to_json_string(use_diff=False))
    if key not in _SITES:
        try:
            found = _capture_skeleton(model_class, source, empty=True)
        except (CaptureError, RuntimeError):
            # Some linear-attention layers read numbers off tensors, which meta tensors do not have.
            found = _capture_skeleton(model_class, source, empty=False)
        _SITES[key] = found
        while len(_SITES) > _SITES_KEPT:
            _SITES.popitem(last=False)
    return _SITES[key]


def _capture_skeleton(
    model_class: type[PreTrainedModel], source: PreTrainedConfig, *, empty: bool
) -> Mapping[str, AttentionSite]:
    """Capture a model built for that only, its weights on meta (``empty``) or random."""
    dtype = torch.get_default_dtype()
    try:
        # Loading builds models on the meta device and in the checkpoint's dtype; facts of rotary embeddings are
        # measured on real numbers, in fp32.
        torch.set_default_dtype(torch.float32)
        with torch.device("cpu"):
            with init_empty_weights(include_buffers=False) if empty else contextlib.nullcontext():
                skeleton: Any = model_class(source)
            return {site.name: site for site in capture(skeleton.eval())}
    finally:
        torch.set_default_dtype(dtype)
