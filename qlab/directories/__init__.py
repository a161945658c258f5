"""What is done to directories without running a model."""
