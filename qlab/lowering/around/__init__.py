"""What happens around the products of a lowered model."""
