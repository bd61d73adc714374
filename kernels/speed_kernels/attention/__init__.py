"""The attention op: which implementation computes it, and why."""
