"""t, noise, losses and gradient."""
