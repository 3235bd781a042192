"""What `sinder.py` works on: random weights, weights with a defect that images show, and such images.

The defect is a hidden unit of one block that few patches trigger and that adds a long vector of one
direction to them. Everything else is random at the scale of trained weights.
"""

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from pretrain.config.derived import ARCHITECTURES, VitShape, vit_shape
from pretrain.config.schema import ModelConfig
from pretrain.models.attention import Backend
from pretrain.models.packing import Layout
from pretrain.models.vit import VisionTransformer
from pretrain.sinder.hits import run_block
from pretrain.surgery.layouts import State

STD = 0.02  # of every matrix and bias, as in DINOv2's initial weights
CUSTOM = {  # (embed_dim, depth, num_heads) of sizes without a name of their own
    "tiny": (64, 4, 4),
    "vit_small_40": (384, 40, 6),  # as deep as ViT-g: there a defect starts behind the limit of 10 blocks
}
SIZES = [f"{name}{ffn}" for name in (*CUSTOM, *ARCHITECTURES) for ffn in ("", "_swiglu")]
SHARE = 0.015  # of the patches that trigger the unit; 2.4 % are defective in the released ViT-g (paper)
SHARP = 16.0  # slope of the unit at its limit: patches below it hardly notice
GAIN = 2.0  # of the unit, in units of sqrt(D)


def model_of(size: str, img_size: int) -> ModelConfig:
    """A backbone of `SIZES` with patches of 14 pixels."""
    name, shape = size.removesuffix("_swiglu"), {"arch": size.removesuffix("_swiglu")}
    if name in CUSTOM:
        shape = dict(zip(("arch", *VitShape._fields), ("custom", *CUSTOM[name]), strict=True))
    ffn = "mlp" if name == size else "swiglu"
    return ModelConfig(
        **shape, patch_size=14, img_size=img_size, layer_scale=1.0, drop_path_rate=0.0, ffn_layer=ffn
    )


def random_blocks(model: ModelConfig) -> State:
    """fp32 weights of the blocks alone: normal matrices and biases, weights of norms and LayerScale 1."""
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in VisionTransformer(model).blocks.state_dict().items()}
    generator, state = torch.Generator().manual_seed(0), {}
    for name, shape in shapes.items():
        ones = name.endswith("gamma") or (".norm" in name and name.endswith("weight"))
        drawn = torch.ones(shape) if ones else STD * torch.randn(shape, generator=generator)
        state[f"blocks.{name}"] = drawn
    return state


def noise(model: ModelConfig, number: int, seed: int, clean: int = 0) -> Tensor:
    """Images in which every patch has a colour of its own, with grain: (n, 3, S, S), normalised.

    Args:
        model: gives the size.
        number: n.
        seed: of the draws.
        clean: how many of them, anywhere in the order, are grain alone: that triggers no defect.
    """
    generator, size = torch.Generator().manual_seed(seed), model.img_size
    coarse = torch.randn(number, 3, size // model.patch_size, size // model.patch_size, generator=generator)
    grain = torch.randn(number, 3, size, size, generator=generator)
    coarse[torch.randperm(number, generator=generator)[:clean]] = 0
    return interpolate(coarse, size=size, mode="nearest") + 0.3 * grain


@torch.no_grad()
def defective_weights(model: ModelConfig, block: int) -> dict[str, Tensor]:
    """A whole backbone's weights, with a defect that starts in a block."""
    backbone = build(model, random_backbone(model))
    generator = torch.Generator().manual_seed(2)
    direction, trigger = torch.randn(2, backbone.embed_dim, generator=generator)
    direction = direction - direction.mean()
    cls, patches = _ffn_inputs(backbone, noise(model, 4, seed=99), block)
    others = torch.linalg.qr(torch.stack([cls.mean(0), torch.ones_like(trigger)]).T)[0]
    trigger -= others @ (others.T @ trigger)  # the class token stays out of it
    trigger /= trigger.norm()
    seen = (patches @ trigger).flatten()
    limit = seen.kthvalue(round((1 - SHARE) * len(seen))).values
    ffn = backbone.blocks[block].mlp
    first, last = (ffn.fc1, ffn.fc2) if model.ffn_layer == "mlp" else (ffn.w12, ffn.w3)
    first.weight[0], first.bias[0] = SHARP * trigger, -SHARP * limit
    if model.ffn_layer == "swiglu":  # the value beside the gate is 1
        half = len(first.weight) // 2
        first.weight[half], first.bias[half] = 0.0, 1.0
    last.weight[:, 0] = GAIN * len(trigger) ** 0.5 * direction / direction.norm()
    return backbone.state_dict()


def random_backbone(model: ModelConfig) -> State:
    """Weights under which tokens grow evenly, and the class token has a content of its own."""
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in VisionTransformer(model).state_dict().items()}
    generator, state = torch.Generator().manual_seed(1), {}
    for name, shape in shapes.items():
        drawn = torch.randn(shape, generator=generator)
        fan_in = shape[1:].numel()
        scale = {"cls_token": 2.0, "pos_embed": STD, "mask_token": 0.0}.get(name, 0.5 / fan_in**0.5)
        state[name] = scale * drawn
        if len(shape) == 1:
            ones = name.endswith("gamma") or ("norm" in name and name.endswith("weight"))
            state[name] = torch.ones(shape) if ones else torch.zeros(shape)
    return state


def build(model: ModelConfig, state: State, backend: Backend = "sdpa") -> VisionTransformer:
    """A frozen backbone with copies of weights."""
    with torch.device("meta"):
        backbone = VisionTransformer(model, backend)
    backbone.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
    return backbone.requires_grad_(False).eval()


def _ffn_inputs(backbone: VisionTransformer, images: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """What the feed-forward layer of a block sees: class tokens (n, D), patches (n, N, D)."""
    tokens = backbone.embed(images)
    for index in range(block):
        tokens = run_block(backbone, index, tokens)
    layer, (number, length, _) = backbone.blocks[block], tokens.shape
    flat = tokens.flatten(0, 1)
    flat = flat + layer.ls1(layer.attn(layer.norm1(flat), Layout((number,), (length,))))
    inputs = layer.norm2(flat).unflatten(0, (number, length))
    return inputs[:, 0], inputs[:, 1:]


def middle(model: ModelConfig) -> int:
    """The block that a defect starts in: 5/8 of the depth."""
    return 5 * vit_shape(model).depth // 8
