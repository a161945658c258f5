"""Text from a model: requests that share steps, a cache in pages, and what is drawn from logits."""
