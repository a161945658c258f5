"""A model directory on disk: where its tensors lie, how they are read and decoded, and how a new
one is written whole."""
