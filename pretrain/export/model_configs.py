"""The config.json of model folders, Hugging Face's and timm's: written from our model section, and read."""

import math
import re
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
CONFIG = "config.json"
TIMM_ARGUMENTS = {  # that change no mathematics beyond what weights and settings tell
    *("img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio", "init_values"),
    *("num_classes", "reg_tokens", "no_embed_class", "dynamic_img_size"),
}
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
    """What a config.json says that weights do not, after a look at what it says about the computation.

    Raises:
        InputError: it is of another model than DINOv2's, or of one that computes something else.
    """
    if "model_type" in config:
        return _hugging_face_settings(config)
    if "architecture" in config:
        return _timm_settings(config)
    return Settings()


def _hugging_face_settings(config: Mapping[str, Any]) -> Settings:
    kind, heads = config["model_type"], config.get("num_attention_heads")
    if kind not in (PLAIN, REGISTERS):
        raise InputError(f"a Hugging Face model of type {kind!r}; {PLAIN} and {REGISTERS} are supported")
    wanted = {"hidden_act": "gelu", "layer_norm_eps": 1e-6, "qkv_bias": True, "quantization_config": None}
    for key, value in wanted.items():
        if config.get(key, value) != value:
            raise InputError(f"{CONFIG}: {key}={config[key]!r}; only {value!r} is supported")
    if "num_attention_heads" in config and (isinstance(heads, bool) or not isinstance(heads, int)):
        raise InputError(f"{CONFIG}: num_attention_heads={heads!r} is no number")
    return Settings(heads, 0.0, kind == REGISTERS)


def _timm_settings(config: Mapping[str, Any]) -> Settings:
    name, arguments = config["architecture"], config.get("model_args", {})
    if not isinstance(name, str) or not re.fullmatch(r"vit_\w+dinov2", name):
        raise InputError(f"{CONFIG}: architecture={name!r}; timm's vit_*_dinov2 are supported")
    if not isinstance(arguments, dict):
        raise InputError(f"{CONFIG}: model_args={arguments!r} is no JSON object")
    unknown = sorted(set(arguments) - TIMM_ARGUMENTS)
    if unknown:
        raise InputError(f"{CONFIG}: model_args.{unknown[0]} is not known here: features could differ")
    patch, size, heads = (arguments.get(key) for key in ("patch_size", "img_size", "num_heads"))
    if heads is not None and (isinstance(heads, bool) or not isinstance(heads, int)):
        raise InputError(f"{CONFIG}: model_args.num_heads={heads!r} is no number")
    return Settings(heads, 0.0, True, _timm_grid(patch, size))


def _timm_grid(patch: object, size: object) -> tuple[int, int] | None:
    """Rows and columns, where both are given as whole numbers."""
    sides = [side for side in size if type(side) is int] if isinstance(size, list) else []
    if type(patch) is not int or patch < 1 or len(sides) != 2:
        return None
    return sides[0] // patch, sides[1] // patch
