"""GGUF files that llama.cpp loads: latent attention, sliding windows, the tokenizer, all in one file."""

from attnedit.targets.runtime.gguf.export import GGUFManifest, export

__all__ = ["GGUFManifest", "export"]
