"""Sources read and refused: hub names, directories, GGUF files, checkpoints part by part."""
