"""Feed-forward layers of a block."""

from typing import Literal

from torch import Tensor, nn
from torch.nn.functional import silu


class Mlp(nn.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        return self.output(self.hidden(x))

    def hidden(self, x: Tensor) -> Tensor:
        """Activations of the hidden units, (..., D) to (..., M)."""
        return self.act(self.fc1(x))

    def output(self, hidden: Tensor) -> Tensor:
        """(..., M) to (..., D)."""
        return self.fc2(hidden)


class SwiGlu(nn.Module):
    """w3(silu(x1) * x2) with x1 | x2 = w12(x): DINOv2's swiglufused layout, gate first."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(dim, 2 * hidden_dim)
        self.w3 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        return self.output(self.hidden(x))

    def hidden(self, x: Tensor) -> Tensor:
        """Activations of the hidden units, (..., D) to (..., M)."""
        gate, value = self.w12(x).chunk(2, dim=-1)
        return silu(gate) * value

    def output(self, hidden: Tensor) -> Tensor:
        """(..., M) to (..., D)."""
        return self.w3(hidden)


def build_ffn(kind: Literal["mlp", "swiglu"], dim: int, hidden_dim: int) -> Mlp | SwiGlu:
    """The feed-forward layer of `model.ffn_layer`."""
    match kind:
        case "mlp":
            return Mlp(dim, hidden_dim)
        case "swiglu":
            return SwiGlu(dim, hidden_dim)
