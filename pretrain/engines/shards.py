"""Tensors that may be spread over ranks: this rank's part, and the whole."""

from torch import Tensor
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """This rank's part, sharing memory; a tensor that is not spread is its own part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """The whole tensor; collective where it is spread."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
