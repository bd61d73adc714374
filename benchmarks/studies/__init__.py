"""Loss curves and overheads: longer runs, side by side."""
