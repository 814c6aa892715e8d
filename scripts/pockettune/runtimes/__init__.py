"""What computes logits: PyTorch with packed sequences, llama.cpp."""
