"""GGUF files, read back."""
