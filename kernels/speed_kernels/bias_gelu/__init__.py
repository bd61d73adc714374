"""The bias_gelu op: a bias and GELU."""
