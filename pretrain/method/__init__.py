"""Methods: a pair of branches, and `targets` and `losses` of one step."""
