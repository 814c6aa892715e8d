"""The gate: whether a GGUF file is the model that it was made of."""
