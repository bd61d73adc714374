"""What every benchmark uses: timing in turns, the environment of a row, latents without files."""
