"""The plain baseline of `step.py`: one DINOv2 training step in the way the original code computes it.

Nothing here is clever. The backbone runs once per crop group, with a linear and an SDPA call for each; masked
patches pass the head in a zero-padded buffer of a fixed upper bound; targets and log-softmaxes are whole fp32
matrices of K columns; each local crop meets each teacher crop on its own; AdamW and EMA are lists of plain
operations; every loss is read by the host. Parameters are named as in `SSLBranch`, so that weights can be
copied. Shapes: the legend of `pretrain.batch`.
"""

from collections import OrderedDict
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.batch import Batch
from pretrain.config.derived import ffn_hidden_dim, vit_shape
from pretrain.config.schema import Config, HeadConfig, ModelConfig
from pretrain.optim.groups import parameter_groups, set_step_values
from pretrain.optim.schedules import StepValues
from pretrain.seeding import torch_stream

Mark = Callable[[str], None]  # called with a part's name when that part of the step is done


class PlainAttention(nn.Module):
    """Self-attention of sequences of one length."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) to (B, N, D)."""
        batch, length, dim = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.num_heads, dim // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).reshape(batch, length, dim))


class PlainSwiGlu(nn.Module):
    """Gated linear unit."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w12, self.w3 = nn.Linear(dim, 2 * hidden_dim), nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


def plain_ffn(cfg: ModelConfig) -> nn.Module:
    """The feed-forward layer of a block."""
    dim, hidden = vit_shape(cfg).embed_dim, ffn_hidden_dim(cfg)
    if cfg.ffn_layer == "swiglu":
        return PlainSwiGlu(dim, hidden)
    layers = {"fc1": nn.Linear(dim, hidden), "act": nn.GELU(), "fc2": nn.Linear(hidden, dim)}
    return nn.Sequential(OrderedDict(layers))


class PlainBlock(nn.Module):
    """A transformer block; drop path runs a branch on a subset of the images and adds it back, scaled."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        dim, _, num_heads = vit_shape(cfg)
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp = PlainAttention(dim, num_heads), plain_ffn(cfg)
        self.ls1, self.ls2 = (nn.ParameterDict({"gamma": torch.empty(dim)}) for _ in range(2))

    def attention_branch(self, x: Tensor) -> Tensor:
        """(B, N, D) to (B, N, D)."""
        return self.attn(self.norm1(x)) * self.ls1.gamma

    def ffn_branch(self, x: Tensor) -> Tensor:
        """(B, N, D) to (B, N, D)."""
        return self.mlp(self.norm2(x)) * self.ls2.gamma

    def forward(self, x: Tensor, rows: Tensor | None) -> Tensor:
        """(B, N, D) to (B, N, D); rows (2, kept): the images that attention and feed-forward run on."""
        if rows is None:
            x = x + self.attention_branch(x)
            return x + self.ffn_branch(x)
        x = add_subset(x, rows[0], self.attention_branch)
        return add_subset(x, rows[1], self.ffn_branch)


def add_subset(x: Tensor, rows: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
    """A residual branch on some images: (B, N, D) to (B, N, D)."""
    update = branch(x[rows])
    return x.index_add(0, rows, update.to(x.dtype), alpha=len(x) / len(rows))


class PlainViT(nn.Module):
    """A vision transformer without registers, for square images."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        dim, depth, _ = vit_shape(cfg)
        self.cfg, self.side = cfg, cfg.img_size // cfg.patch_size
        patches = nn.Conv2d(cfg.in_channels, dim, kernel_size=cfg.patch_size, stride=cfg.patch_size)
        self.patch_embed = nn.ModuleDict({"proj": patches})
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + self.side**2, dim))
        self.mask_token = nn.Parameter(torch.empty(1, dim))
        self.blocks = nn.ModuleList(PlainBlock(cfg) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def positions(self, count: int) -> Tensor:
        """Position embeddings (1, 1 + count, D) of a square grid of `count` patches."""
        if count == self.side**2:
            return self.pos_embed
        scale = (count**0.5 + self.cfg.pos_embed_offset) / self.side
        grid = self.pos_embed[:, 1:].float().reshape(1, self.side, self.side, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)

    def forward(
        self, images: Tensor, masks: Tensor | None = None, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Normed class tokens (B, D) and patch tokens (B, N, D) of images (B, C, S, S)."""
        x = self.patch_embed["proj"](images).flatten(2).transpose(1, 2)
        if masks is not None:
            x = torch.where(masks.unsqueeze(-1), self.mask_token.to(x.dtype).unsqueeze(0), x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.positions(x.shape[1])
        for index, block in enumerate(self.blocks):
            x = block(x, None if rows is None else rows[index])
        x = self.norm(x)
        return x[:, 0], x[:, 1:]


class PlainPrototypes(nn.Module):
    """Weight-normed prototypes."""

    def __init__(self, count: int, dim: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.empty(count, 1))
        self.weight_v = nn.Parameter(torch.empty(count, dim))

    def forward(self, x: Tensor) -> Tensor:
        """(rows, b) to (rows, K), with the fused kernel behind `torch.nn.utils.weight_norm`."""
        return F.linear(x, torch._weight_norm(self.weight_v, self.weight_g, 0))


class PlainHead(nn.Module):
    """The trainable head, in two halves so that the parts of a step can be told apart."""

    def __init__(self, in_dim: int, cfg: HeadConfig) -> None:
        super().__init__()
        widths = [in_dim, *[cfg.hidden_dim] * (cfg.num_layers - 1), cfg.bottleneck_dim]
        layers = [layer for n, m in pairwise(widths) for layer in (nn.Linear(n, m), nn.GELU())]
        self.mlp = nn.Sequential(*layers[:-1])
        self.last_layer = PlainPrototypes(cfg.prototypes, cfg.bottleneck_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, D) to the bottleneck (rows, b)."""
        return F.normalize(self.mlp(x), dim=-1, eps=1e-12)


class PlainRmlp(nn.Module):
    """The randomized head of one loss in one branch: `draw` before every step."""

    def __init__(self, cfg: Config, loss: str, role: str, device: torch.device) -> None:
        super().__init__()
        dim = vit_shape(cfg.model).embed_dim
        self.widths = [dim, 4 * dim, 4 * dim, 2 * dim // 3, cfg.rmlp.outputs]
        self.seed, self.amplitude = cfg.run.seed, cfg.rmlp.amplitude
        self.stream, self.device = (loss, role), device

    def draw(self, step: int) -> None:
        """The same noise as `RmlpHead` draws."""
        self.weights = []
        for index, (n, m) in enumerate(pairwise(self.widths)):
            generator = torch_stream(self.seed, "rmlp", *self.stream, index, step, device=self.device)
            noise = torch.randn(n, m, generator=generator, device=self.device)
            self.weights.append(torch.eye(n, m, device=self.device) + self.amplitude / m * noise)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, D) to (rows, 2D//3)."""
        for weight in self.weights[:-1]:
            x = F.gelu(x @ weight)
        return x

    def last_layer(self, x: Tensor) -> Tensor:
        """(rows, 2D//3) to (rows, K)."""
        return x @ self.weights[-1]


class PlainBranch(nn.Module):
    """Backbone and head of the student or the teacher."""

    def __init__(self, cfg: Config, role: str, device: torch.device) -> None:
        super().__init__()
        self.backbone = PlainViT(cfg.model)
        self.random = {}
        if cfg.dino_head.kind == "rmlp":
            self.random = {loss: PlainRmlp(cfg, loss, role, device) for loss in ("dino", "ibot")}
        else:
            self.dino_head = PlainHead(vit_shape(cfg.model).embed_dim, cfg.dino_head)

    def bottleneck(self, cls: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Both groups of rows through the head but its last layer; the shared head runs once."""
        if self.random:
            return self.random["dino"](cls), self.random["ibot"](patches)
        first, second = self.dino_head(torch.cat([cls, patches])).split([len(cls), len(patches)])
        return first, second

    def logits(self, cls: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Both groups of rows through the last layer."""
        if self.random:
            return self.random["dino"].last_layer(cls), self.random["ibot"].last_layer(patches)
        first, second = self.dino_head.last_layer(torch.cat([cls, patches])).split([len(cls), len(patches)])
        return first, second


class Baseline:
    """Student, teacher, centres and optimizer, with the initial weights of an `SSLBranch`."""

    def __init__(self, cfg: Config, weights: dict[str, Tensor], device: torch.device) -> None:
        self.cfg, self.device = cfg, device
        self.student = PlainBranch(cfg, "student", device)
        self.teacher = PlainBranch(cfg, "teacher", device)
        for branch in (self.student, self.teacher):
            branch.load_state_dict(weights)
            branch.to(device)
        self.teacher.requires_grad_(False).eval()
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=cfg.engine.precision == "bf16")
        groups = parameter_groups(self.student.named_parameters(), vit_shape(cfg.model).depth, cfg.optim)
        betas = cfg.optim.beta1, cfg.optim.beta2
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=1e-8, foreach=True)
        self.ema = list(self.teacher.parameters()), list(self.student.parameters())
        outputs = cfg.rmlp.outputs if self.student.random else cfg.dino_head.prototypes
        self.centers = {loss: torch.zeros(1, outputs, device=device) for loss in ("dino", "ibot")}

    def step(self, batch: Batch, step: int, values: StepValues, mark: Mark) -> dict[str, float]:
        """One training step; its losses and gradient norms."""
        self.begin(step, values)
        with torch.no_grad():
            features = self.teacher_features(batch)
            mark("teacher")
            targets = self.targets(features, len(batch.mask_indices), values.teacher_temp)
            mark("targets")
        cls, features = self.student_features(batch)
        mark("student forward")
        losses = self.losses(cls, features, targets, batch)
        mark("losses")
        losses["total"].backward()
        mark("backward")
        norms = self.update()
        mark("clip + optimizer")
        self.update_teacher(values.momentum)
        mark("EMA")
        logged = {name: value.item() for name, value in {**losses, **norms}.items()}  # a sync for each
        mark("log")
        return logged

    def begin(self, step: int, values: StepValues) -> None:
        """Learning rates, no gradients, new random heads."""
        set_step_values(self.optimizer.param_groups, values)
        self.optimizer.zero_grad(set_to_none=True)
        for branch in (self.student, self.teacher):
            for head in branch.random.values():
                head.draw(step)

    def padded(self, patches: Tensor, batch: Batch) -> Tensor:
        """The masked patches (M, D) of (2B, N, D) in a buffer of fixed length, zeros behind them."""
        buffer = patches.new_zeros(masks_upper_bound(self.cfg, batch.num_images), patches.shape[-1])
        buffer[: len(batch.mask_indices)] = patches.flatten(0, 1).index_select(0, batch.mask_indices)
        return buffer

    def teacher_features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Bottlenecks of the class tokens, second crop first, and of the padded masked patches."""
        with self.autocast:
            cls, patches = self.teacher.backbone(batch.global_crops)
            first, second = cls.chunk(2)
            return self.teacher.bottleneck(torch.cat([second, first]), self.padded(patches, batch))

    def targets(self, features: tuple[Tensor, Tensor], masked: int, temp: float) -> tuple[Tensor, Tensor]:
        """Probabilities (2B, K), second crop first, and (M, K)."""
        with self.autocast:
            cls, patches = self.teacher.logits(*features)
        return self.centered("dino", cls, temp), self.centered("ibot", patches[:masked], temp)

    def centered(self, loss: str, logits: Tensor, temp: float) -> Tensor:
        """Targets (rows, K) float32 from the teacher's logits."""
        logits = logits.float()
        if self.cfg.loss.centering == "sinkhorn":
            return sinkhorn(logits, temp, self.cfg.loss.sinkhorn_iterations)
        targets = F.softmax((logits - self.centers[loss]) / temp, dim=-1)
        momentum = self.cfg.loss.center_momentum
        mean = logits.mean(0, keepdim=True)
        self.centers[loss] = self.centers[loss] * momentum + mean * (1 - momentum)
        return targets

    def student_features(self, batch: Batch) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Class tokens of the global crops, then the bottlenecks: local and global crops, patches."""
        with self.autocast:
            cls, patches = self.student.backbone(batch.global_crops, batch.masks, batch.drop_global)
            local, _ = self.student.backbone(batch.local_crops, None, batch.drop_local)
            return cls, self.student.bottleneck(torch.cat([local, cls]), self.padded(patches, batch))

    def losses(
        self, cls: Tensor, features: tuple[Tensor, Tensor], targets: tuple[Tensor, Tensor], batch: Batch
    ) -> dict[str, Tensor]:
        """All terms and their weighted total."""
        size, masked, weights = batch.num_images, len(batch.mask_indices), self.cfg.loss
        with self.autocast:
            cls_logits, patch_logits = self.student.logits(*features)
        local, both = cls_logits.split([len(batch.local_crops), 2 * size])
        temp, pairs = weights.student_temp, 2 + 2 * (len(local) // size)
        parts = {
            "dino_global": pair_loss([both], [targets[0]], temp) * 2 / pairs,
            "dino_local": pair_loss(local.chunk(len(local) // size), targets[0].chunk(2), temp) / pairs,
            "ibot": patch_loss(patch_logits[:masked], targets[1], batch.mask_weights, 2 * size, temp),
            "koleo": sum((koleo(crop) for crop in cls.chunk(2)), torch.zeros((), device=self.device)),
        }
        total = weights.dino_weight * (parts["dino_global"] + parts["dino_local"])
        total = total + weights.ibot_weight * parts["ibot"] + weights.koleo_weight * parts["koleo"]
        return {"total": total, **parts}

    def update(self) -> dict[str, Tensor]:
        """Clip each sub-module, then AdamW; the norms before clipping."""
        limit = self.cfg.optim.clip_grad_norm
        norms = {
            f"grad_norm_{name}": nn.utils.clip_grad_norm_(child.parameters(), limit)
            for name, child in self.student.named_children()
        }
        self.optimizer.step()
        return norms

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """teacher = momentum * teacher + (1 - momentum) * student."""
        torch._foreach_mul_(self.ema[0], momentum)
        torch._foreach_add_(self.ema[0], self.ema[1], alpha=1 - momentum)


def masks_upper_bound(cfg: Config, images: int) -> int:
    """The most masked patches that the budgets of a group can add up to."""
    count = int(2 * images * cfg.mask.probability)
    low, high = cfg.mask.ratio
    patches = (cfg.data.global_crops.size // cfg.model.patch_size) ** 2
    return sum(int(patches * (low + (high - low) * (i + 1) / count)) for i in range(count))


def sinkhorn(logits: Tensor, temp: float, iterations: int) -> Tensor:
    """(rows, K) targets: the whole matrix exponentiated, its rows and columns divided in place in turn."""
    plan = torch.exp(logits / temp).t()  # (K, rows)
    outputs, rows = plan.shape
    plan /= plan.sum()
    for _ in range(iterations):
        plan /= plan.sum(dim=1, keepdim=True)
        plan /= outputs
        plan /= plan.sum(dim=0, keepdim=True)
        plan /= rows
    plan *= rows
    return plan.t()


def pair_loss(students: list[Tensor], teachers: list[Tensor], temp: float) -> Tensor:
    """Cross-entropy of every student crop (rows, K) with every teacher crop, means over rows summed."""
    total = torch.zeros((), device=students[0].device)
    for student in students:
        log_probabilities = F.log_softmax(student.float() / temp, dim=-1)
        for teacher in teachers:
            total = total - (teacher * log_probabilities).sum(-1).mean()
    return total


def patch_loss(student: Tensor, targets: Tensor, weights: Tensor, crops: int, temp: float) -> Tensor:
    """Weighted cross-entropy of masked patches (M, K), per crop."""
    rows = (targets * F.log_softmax(student.float() / temp, dim=-1)).sum(-1)
    return -(rows * weights).sum() / crops


def koleo(features: Tensor) -> Tensor:
    """-mean log distance to the nearest of (B, D)."""
    x = F.normalize(features.float(), dim=-1, eps=1e-8)
    with torch.no_grad():
        similarity = x @ x.t()
        nearest = similarity.fill_diagonal_(-1).argmax(dim=1)
    return -torch.log(F.pairwise_distance(x, x[nearest], eps=1e-8) + 1e-8).mean()
