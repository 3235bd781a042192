"""Weights as files: the one place that writes and reads them, ours and those of other programs."""

from pretrain.export.own import Export, read_export, write_export

__all__ = ["Export", "read_export", "write_export"]
