"""Weights on disk: our safetensors, and the formats of others."""
