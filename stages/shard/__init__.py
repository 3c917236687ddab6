"""The shard format, both ends of it: deterministic tars, the mouth-crop codec, the sample reader, the index."""
