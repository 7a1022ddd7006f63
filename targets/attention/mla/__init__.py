"""Multi-head latent attention: a small latent and a few rotary slots are cached in place of keys and values."""

from attnedit.targets.attention.mla.config import MLAConfig
from attnedit.targets.attention.mla.module import MLA, choose_path

__all__ = ["MLA", "MLAConfig", "choose_path"]
