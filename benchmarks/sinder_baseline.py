"""The plain sides of `sinder.py`: directions by sampling, and a repair of one image at a time.

Both follow the schedule of the released code (SINDER, arXiv 2407.16826), written from the paper's equations.
Directions: each feed-forward layer is fitted to many samples by least squares, the product of all blocks is
decomposed whole. Repair: every linear layer is U diag(S + e) V^T, recomposed in every forward; queries, keys
and values have a decomposition each, of which the values' alone is trained; gradients are recorded from the
first block on, and those beyond the limit are dropped after the backward.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.config.derived import vit_shape
from pretrain.config.schema import ModelConfig
from pretrain.sinder.hits import Criterion
from pretrain.surgery.layouts import State

Solve = Callable[[Tensor, Tensor], Tensor]  # X (n, D), Y (n, M) to the (D, M) that minimises |X L - Y|
GAUSSIAN = torch.tensor([1.0, 2, 1, 2, 4, 2, 1, 2, 1]) / 16
TEMPERATURE = 0.1


def least_squares(x: Tensor, y: Tensor) -> Tensor:
    """By a QR decomposition, as in the released code."""
    return torch.linalg.lstsq(x, y).solution


def normal_equations(x: Tensor, y: Tensor) -> Tensor:
    """The fastest way for so many samples; as exact here, for X is well conditioned."""
    return torch.linalg.solve(x.T @ x, x.T @ y)


def sampled_directions(
    state: State, model: ModelConfig, samples: int, solve: Solve, seed: int
) -> list[Tensor]:
    """The direction (D,) after each block, in fp32."""
    dim, depth, _ = vit_shape(model)
    generator = torch.Generator().manual_seed(seed)
    product, directions = torch.eye(dim), []
    for index in range(depth):
        w = block_weights(state, index)
        x = torch.randn(samples, dim, generator=generator)
        hidden, out = hidden_units(x, w), w["mlp.fc2.weight" if "mlp.fc2.weight" in w else "mlp.w3.weight"]
        attention = w["attn.proj.weight"] @ w["attn.qkv.weight"].chunk(3)[2]
        for branch, linear in (("1", attention), ("2", out @ solve(x, hidden).T)):
            product = residual(linear, w[f"norm{branch}.weight"], w[f"ls{branch}.gamma"]) @ product
        directions.append(torch.linalg.svd(product).U[:, 0])
    return directions


def block_weights(state: State, index: int) -> dict[str, Tensor]:
    """The weights of a block, by their names in it."""
    prefix = f"blocks.{index}."
    return {name.removeprefix(prefix): w for name, w in state.items() if name.startswith(prefix)}


def hidden_units(x: Tensor, w: State) -> Tensor:
    """(n, D) to the (n, M) hidden units of the feed-forward layer."""
    if "mlp.fc1.weight" in w:
        return F.gelu(F.linear(x, w["mlp.fc1.weight"], w["mlp.fc1.bias"]))
    gate, value = F.linear(x, w["mlp.w12.weight"], w["mlp.w12.bias"]).chunk(2, dim=-1)
    return F.silu(gate) * value


def residual(linear: Tensor, norm: Tensor, gamma: Tensor) -> Tensor:
    """I + diag(gamma) linear diag(norm) (I - 11^T / D)."""
    eye = torch.eye(len(linear))
    return eye + gamma[:, None] * linear * norm @ (eye - 1 / len(linear))


class Decomposed(nn.Module):
    """A matrix as U diag(S + e) V^T."""

    def __init__(self, weight: Tensor, trained: bool) -> None:
        super().__init__()
        self.u, self.s, self.vh = torch.linalg.svd(weight, full_matrices=False)
        self.epsilon = nn.Parameter(torch.zeros_like(self.s), requires_grad=trained)

    def forward(self) -> Tensor:
        """The matrix."""
        return (self.u * (self.s + self.epsilon)) @ self.vh


class PlainLinear(nn.Module):
    """A linear layer of matrices one above the other, of which the last is trained."""

    def __init__(self, weight: Tensor, bias: Tensor, matrices: int = 1) -> None:
        super().__init__()
        parts = enumerate(weight.chunk(matrices), start=1)
        self.parts = nn.ModuleList(Decomposed(part, number == matrices) for number, part in parts)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        matrices = [part() for part in self.parts]
        return F.linear(x, matrices[0] if len(matrices) == 1 else torch.cat(matrices), self.bias)


class PlainBlock(nn.Module):
    """A transformer block."""

    def __init__(self, w: State, num_heads: int) -> None:
        super().__init__()
        self.weights, self.num_heads, self.layers = dict(w), num_heads, nn.ModuleDict()
        for name in sorted({name.rpartition(".")[0] for name in w if name.startswith(("attn.", "mlp."))}):
            matrices = 3 if name == "attn.qkv" else 1
            layer = PlainLinear(w[f"{name}.weight"], w[f"{name}.bias"], matrices)
            self.layers[name.rpartition(".")[2]] = layer

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        x = x + self.weights["ls1.gamma"] * self.attention(self.norm(x, "norm1"))
        return x + self.weights["ls2.gamma"] * self.ffn(self.norm(x, "norm2"))

    def norm(self, x: Tensor, name: str) -> Tensor:
        """LayerNorm."""
        return F.layer_norm(
            x, x.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], 1e-6
        )

    def attention(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        qkv = self.layers["qkv"](x).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return self.layers["proj"](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def ffn(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        if "fc1" in self.layers:
            return self.layers["fc2"](F.gelu(self.layers["fc1"](x)))
        gate, value = self.layers["w12"](x).chunk(2, dim=-1)
        return self.layers["w3"](F.silu(gate) * value)


class PlainStep(NamedTuple):
    """What a step saw."""

    loss: float  # 0 for a clean image
    block: int  # that showed the defect; -1 for a clean image
    patches: int  # defective ones


class PlainRepair:
    """A backbone under repair."""

    def __init__(
        self,
        state: State,
        model: ModelConfig,
        directions: Sequence[Tensor],
        criterion: Criterion,
        lr: float,
        momentum: float,
    ) -> None:
        depth, heads = vit_shape(model)[1:]
        self.state, self.patch_size, self.criterion = state, model.patch_size, criterion
        self.directions = list(directions)
        self.blocks = nn.ModuleList(PlainBlock(block_weights(state, i), heads) for i in range(depth))
        self.trained = {n: p for n, p in self.blocks.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.SGD(self.trained.values(), lr, momentum)

    def step(self, image: Tensor) -> PlainStep:
        """Take one image (1, C, S, S)."""
        self.optimizer.zero_grad(set_to_none=True)
        tokens, side = self.embed(image), image.shape[-1] // self.patch_size
        for index, (block, direction) in enumerate(zip(self.blocks, self.directions, strict=True)):
            tokens = block(tokens)
            grid = tokens[0, 1:].unflatten(0, (side, side))
            cosines, defective = defects(grid.detach(), direction, self.criterion.threshold)
            number = int(defective.sum())
            if index >= self.criterion.first_block and number >= self.criterion.least:
                loss = smooth_loss(grid, cosines, defective)
                loss.backward()
                self.update(index)
                return PlainStep(loss.item(), index, number)
        return PlainStep(0.0, -1, 0)

    def state_dict(self) -> dict[str, Any]:
        """Singular values and momentum, as copies."""
        return deepcopy({"trained": self.trained, "optimizer": self.optimizer.state_dict()})

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to where `state_dict` was taken."""
        for name, parameter in self.trained.items():
            parameter.copy_(state["trained"][name])
        self.optimizer.load_state_dict(state["optimizer"])

    def embed(self, image: Tensor) -> Tensor:
        """Tokens (1, T, D) before the first block."""
        state = self.state
        weight, bias = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
        patches = F.conv2d(image, weight, bias, self.patch_size).flatten(2).transpose(1, 2)
        return torch.cat([state["cls_token"], patches], dim=1) + state["pos_embed"]

    def update(self, hit: int) -> None:
        """Drop the gradients of the blocks before the limit, step where the others are finite."""
        for block in self.blocks[: max(hit - self.criterion.limit_layers + 1, 0)]:
            for parameter in block.parameters():
                parameter.grad = None
        gradients = [p.grad for p in self.trained.values() if p.grad is not None]
        if all(bool(gradient.isfinite().all()) for gradient in gradients):
            self.optimizer.step()


def defects(grid: Tensor, direction: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """|cos| of patch tokens (h, w, D) to a direction, and those that stand out, but at the border."""
    cosines = F.cosine_similarity(grid, direction, dim=-1).abs()
    defective = cosines > cosines.mean() + threshold * cosines.std()
    defective[[0, -1]] = False
    defective[:, [0, -1]] = False
    return cosines, defective


def smooth_loss(grid: Tensor, cosines: Tensor, defective: Tensor) -> Tensor:
    """Mean distance of defective tokens to the mean of their 3 x 3 windows, over the mean norm inside."""
    with torch.no_grad():
        rows, cols = defective.nonzero().T
        steps = torch.arange(-1, 2)
        rows = (rows[:, None] + steps)[:, :, None].expand(-1, 3, 3).flatten(1)  # (n, 9)
        cols = (cols[:, None] + steps)[:, None, :].expand(-1, 3, 3).flatten(1)
        weights = torch.exp(-cosines[rows, cols] / TEMPERATURE)
        weights = weights / weights.sum(dim=1, keepdim=True) * GAUSSIAN
        weights = weights / weights.sum(dim=1, keepdim=True)
        targets = (weights[..., None] * grid[rows, cols]).sum(dim=1)
        scale = grid[1:-1, 1:-1].norm(dim=-1).mean()
    return (grid[defective] - targets).norm(dim=-1).mean() / scale
