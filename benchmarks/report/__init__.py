"""Pages of rows, targets, predictions."""
