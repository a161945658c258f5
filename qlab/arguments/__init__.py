"""What the public functions take."""
