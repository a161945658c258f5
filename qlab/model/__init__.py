"""A model that transformers knows, on the meta device: its blocks, their inputs, and what its
tensors are called in files."""
