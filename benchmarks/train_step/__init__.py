"""The whole training step: providers, gate, profile."""
