"""From a trained network to samples."""
