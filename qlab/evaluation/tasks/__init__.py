"""Tasks of lm-eval: what a model answers right, and how much of that another model keeps."""
