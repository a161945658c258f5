"""torch.compile's options, and the pass that fuses."""
