"""Which layer and module of a frozen backbone to probe (arXiv 2603.05280)."""
