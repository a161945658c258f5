"""How much worse a quantized model is."""
