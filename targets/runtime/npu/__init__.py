"""Ascend NPU: graphs of fused operators, checked on reference implementations, and the scripts that run them there."""

from attnedit.targets.runtime.npu.export import export
from attnedit.targets.runtime.npu.inspect import inspect, table
from attnedit.targets.runtime.npu.manifest import Manifest
from attnedit.targets.runtime.npu.run_npu import MANIFEST_FILE, NpuModel

__all__ = ["MANIFEST_FILE", "Manifest", "NpuModel", "export", "inspect", "table"]
