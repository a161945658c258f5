"""Quantizing a model: plan, observe, solve, write."""
