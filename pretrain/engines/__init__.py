"""Engines: one training step executed on one device or many."""
