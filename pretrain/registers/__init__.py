"""What registers and the class token of a backbone carry: replaced, and compared with the full model."""
