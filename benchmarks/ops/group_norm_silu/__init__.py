"""Group normalisation with SiLU."""
