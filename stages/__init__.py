"""What is done to one clip: pure functions on arrays, with no knowledge of processes, chunks or training."""
