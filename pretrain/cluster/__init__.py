"""Jobs: how a run is sent to machines, restarted, watched and stopped. No torch: it answers at once."""
