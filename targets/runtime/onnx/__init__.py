"""ONNX runtime: export with cache inputs and outputs, and a runner for what was exported."""

from attnedit.targets.runtime.onnx.export import export
from attnedit.targets.runtime.onnx.manifest import MANIFEST_FILE, Manifest
from attnedit.targets.runtime.onnx.runner import Decoding, OnnxModel

__all__ = ["MANIFEST_FILE", "Decoding", "Manifest", "OnnxModel", "export"]
