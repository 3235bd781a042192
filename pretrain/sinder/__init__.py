"""Singular defects of vision transformers (SINDER, arXiv 2407.16826): predicted, found, repaired."""
