"""Ascend NPU runtime."""
