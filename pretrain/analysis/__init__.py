"""What a backbone's frozen features are worth."""
