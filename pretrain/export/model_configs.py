"""The config.json of model folders, Hugging Face's and timm's: written from our model section, and read."""

import math
from collections.abc import Mapping
from typing import Any

from pretrain.config.derived import ffn_hidden_dim, position_grid, vit_shape
from pretrain.config.schema import ModelConfig
from pretrain.errors import InputError
from pretrain.surgery.architecture import Settings

IMAGENET_MEAN, IMAGENET_STD = (
    [0.485, 0.456, 0.406],
    [0.229, 0.224, 0.225],
)  # of RGB / 255, the recipes' default
PLAIN, REGISTERS = "dinov2", "dinov2_with_registers"  # Hugging Face's model types
TIMM_SIZES = {"small": 384, "base": 768, "large": 1024, "giant": 1536}  # timm's name and width


def hugging_face_config(model: ModelConfig, dtype: str) -> dict[str, Any]:
    """What `transformers.AutoModel.from_pretrained` needs.

    Args:
        model: of the weights.
        dtype: of the weights, as `float32`.
    """
    dim, depth, heads = vit_shape(model)
    kind = "Dinov2WithRegistersModel" if model.num_register_tokens else "Dinov2Model"
    config: dict[str, Any] = {
        "architectures": [kind],
        "model_type": REGISTERS if model.num_register_tokens else PLAIN,
        "hidden_size": dim,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "mlp_ratio": int(model.ffn_ratio),
        "hidden_act": "gelu",
        "use_swiglu_ffn": model.ffn_layer == "swiglu",
        "image_size": model.img_size,
        "patch_size": model.patch_size,
        "num_channels": model.in_channels,
        "qkv_bias": True,
        "layer_norm_eps": 1e-6,
        "layerscale_value": 1.0 if model.layer_scale is None else model.layer_scale,
        "drop_path_rate": 0.0,
        "dtype": dtype,
        "torch_dtype": dtype,  # as transformers before 4.56 calls it
    }
    if model.num_register_tokens:
        config["num_register_tokens"] = model.num_register_tokens
    return config


def image_processor(model: ModelConfig) -> dict[str, Any]:
    """Hugging Face's preprocessor_config.json: a centre crop at the size of the position grid."""
    size = model.img_size
    return {
        "image_processor_type": "BitImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": math.ceil(size / 0.875)},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": IMAGENET_MEAN,
        "image_std": IMAGENET_STD,
        "do_convert_rgb": True,
    }


def timm_config(model: ModelConfig) -> dict[str, Any]:
    """What `timm.create_model("local-dir:FOLDER", pretrained=True)` needs."""
    rows, columns = (n * model.patch_size for n in position_grid(model))
    dim = vit_shape(model).embed_dim
    plain = model.in_channels == len(IMAGENET_MEAN)
    return {
        "architecture": timm_architecture(model),
        "num_classes": 0,
        "num_features": dim,
        "global_pool": "token",
        "model_args": timm_arguments(model),
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [model.in_channels, rows, columns],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "mean": IMAGENET_MEAN if plain else [0.5] * model.in_channels,
            "std": IMAGENET_STD if plain else [0.5] * model.in_channels,
            "num_classes": 0,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def timm_architecture(model: ModelConfig) -> str:
    """The name of timm's model that differs least; its arguments do the rest. Only giant ones have SwiGLU."""
    dim = vit_shape(model).embed_dim
    size = "giant" if model.ffn_layer == "swiglu" else "base"
    if model.ffn_layer == "mlp":
        size = next((name for name, width in TIMM_SIZES.items() if width == dim and name != "giant"), "base")
    return f"vit_{size}_patch14_{'reg4_' if model.num_register_tokens else ''}dinov2"


def timm_arguments(model: ModelConfig) -> dict[str, Any]:
    """The arguments of `timm.create_model` beside the name."""
    dim, depth, heads = vit_shape(model)
    rows, columns = (n * model.patch_size for n in position_grid(model))
    hidden = ffn_hidden_dim(model) * (2 if model.ffn_layer == "swiglu" else 1)
    ratio = hidden / dim
    arguments: dict[str, Any] = {
        "img_size": [rows, columns],
        "patch_size": model.patch_size,
        "in_chans": model.in_channels,
        "embed_dim": dim,
        "depth": depth,
        "num_heads": heads,
        "mlp_ratio": ratio if int(dim * ratio) == hidden else (hidden + 0.5) / dim,
        "init_values": model.layer_scale or 0.0,  # 0 = none; timm leaves the default where None is given
        "num_classes": 0,
    }
    if model.num_register_tokens:
        arguments |= {"reg_tokens": model.num_register_tokens, "no_embed_class": True}
    return arguments


def settings_of(config: Mapping[str, Any]) -> Settings:
    """What a config.json says that weights do not.

    Raises:
        InputError: it is of another model than DINOv2's.
    """
    if "model_type" in config:
        kind = config["model_type"]
        if kind not in (PLAIN, REGISTERS):
            raise InputError(f"a Hugging Face model of type {kind!r}; {PLAIN} and {REGISTERS} are supported")
        heads = config.get("num_attention_heads")
        return Settings(heads if isinstance(heads, int) else None, 0.0, kind == REGISTERS)
    if "architecture" in config:
        arguments = config.get("model_args", {})
        patch, size = arguments.get("patch_size"), arguments.get("img_size")
        known = isinstance(patch, int) and isinstance(size, list) and len(size) == 2
        grid = (size[0] // patch, size[1] // patch) if known else None
        return Settings(arguments.get("num_heads"), 0.0, True, grid)
    return Settings()
