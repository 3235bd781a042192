"""What a run keeps while it trains: checkpoints, metrics, progress, a record of its environment."""
