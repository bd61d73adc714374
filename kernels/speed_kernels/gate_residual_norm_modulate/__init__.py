"""The gate_residual_norm_modulate op: what lies between a DiT's matrix products."""
