"""What a run is: schema, loading, checks and derived values. No torch."""
