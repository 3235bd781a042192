"""From tar shards to batches of augmented crops."""
