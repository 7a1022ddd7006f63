"""Gated sliding-window attention: only a window and the first tokens are cached."""

from attnedit.targets.attention.gateswa.config import GateSWAConfig
from attnedit.targets.attention.gateswa.module import GateSWA

__all__ = ["GateSWA", "GateSWAConfig"]
