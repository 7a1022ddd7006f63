"""Eager runtime: rewritten attention inside a live transformers model, saved and loaded as model type "attnedit"."""

from attnedit.compiler.graph.modules import share_copy
from attnedit.targets.runtime.eager.cache import bind_cache, bounded_cache
from attnedit.targets.runtime.eager.checkpoint import load_model, save
from attnedit.targets.runtime.eager.classes import (
    AttneditConfig,
    attnedit_classes,
    source_config,
    to_attnedit,
    use_captured_implementation,
)
from attnedit.targets.runtime.eager.early import initialize_early
from attnedit.targets.runtime.eager.splice import splice

__all__ = [
    "AttneditConfig",
    "attnedit_classes",
    "bind_cache",
    "bounded_cache",
    "initialize_early",
    "load_model",
    "save",
    "share_copy",
    "source_config",
    "splice",
    "to_attnedit",
    "use_captured_implementation",
]
