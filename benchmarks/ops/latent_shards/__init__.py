"""The shard reader."""
