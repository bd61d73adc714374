"""AdamW and EMA of the weights in one pass: the ops (`op.py`) and the optimizer (`optimizer.py`)."""
