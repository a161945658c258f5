"""Timing kernels, and choosing among them."""
