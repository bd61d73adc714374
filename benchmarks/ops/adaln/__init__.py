"""Gate, residual, norm, modulate, bias and GELU."""
