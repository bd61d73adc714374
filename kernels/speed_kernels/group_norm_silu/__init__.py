"""The group_norm_silu op: group normalisation with SiLU."""
