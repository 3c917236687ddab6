"""The trainer: shards in, a lip reader out."""
