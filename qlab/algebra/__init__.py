"""What a block of a model is as a value, and what may be done to it. Knows no model library and no
file."""
