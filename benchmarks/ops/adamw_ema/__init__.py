"""AdamW with EMA."""
