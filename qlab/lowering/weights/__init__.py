"""Quantized weights as modules, and their products."""
