"""Grouped latent attention (GLA, arXiv 2505.21487) as a target of attnedit."""

from attnedit_gla.config import GroupedLatentConfig
from attnedit_gla.kind import KIND
from attnedit_gla.module import GroupedLatent
from attnedit_gla.target import GroupedLatentTarget

GLA = GroupedLatentTarget()
"""What the entry point names."""

__all__ = ["GLA", "KIND", "GroupedLatent", "GroupedLatentConfig", "GroupedLatentTarget"]
