"""Projection heads: (rows, D) to the two factors of (rows, K) logits."""

from pretrain.heads.mix import mix
from pretrain.heads.mlp import MlpHead
from pretrain.heads.rmlp import RmlpHead

__all__ = ["MlpHead", "RmlpHead", "mix"]
