"""Changes to a backbone's weights as pure functions: state dict and model section in, the same out."""
