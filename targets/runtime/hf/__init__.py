"""Checkpoints that transformers loads without attnedit: classes of its own, or code in the directory; model cards."""

from attnedit.targets.runtime.hf.card import model_card
from attnedit.targets.runtime.hf.export import HFManifest, export
from attnedit.targets.runtime.hf.profiles import PROFILES

__all__ = ["PROFILES", "HFManifest", "export", "model_card"]
