"""vLLM: a plugin that serves saved results as they are (entry point ``vllm.general_plugins``)."""

from attnedit.targets.runtime.vllm.limits import TESTED, Settings, check
from attnedit.targets.runtime.vllm.plugin import register

__all__ = ["TESTED", "Settings", "check", "register"]
