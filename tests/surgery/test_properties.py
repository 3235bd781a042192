"""What holds for every backbone, on small random ones: identities, and refusals that leave no file."""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.config.derived import position_grid
from pretrain.config.schema import ModelConfig
from pretrain.errors import InputError
from pretrain.export import write_export
from pretrain.export.transform import Order, convert, transform
from pretrain.surgery.combine import average
from pretrain.surgery.conversion import Target, read_backbone, write_layout
from pretrain.surgery.registers import MAX_REGISTERS, add_registers, drop_registers
from pretrain.surgery.resize import (
    MAX_CHANNELS,
    MAX_PATCH,
    MAX_SIZE,
    resize_channels,
    resize_patch,
    resize_positions,
)
from tests.surgery.backbones import equal, place, random_state
from tests.surgery.test_conversion import as_held

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
FORMATS = get_args(Target)
few = settings(max_examples=8, deadline=None, derandomize=True)


@st.composite
def models(draw: st.DrawFn) -> ModelConfig:
    """Small backbones of every kind; width 64 a head, so that weights alone tell the heads."""
    patch, rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 5)), draw(st.integers(1, 5))
    heads = draw(st.integers(1, 3))
    width = draw(st.integers(8, 300))  # of the feed-forward layer, before SwiGLU's 2/3
    return ModelConfig(
        arch="custom",
        embed_dim=64 * heads,
        depth=draw(st.integers(1, 4)),
        num_heads=heads,
        patch_size=patch,
        img_size=rows * patch,
        img_width=draw(st.sampled_from([None, columns * patch])),
        in_channels=draw(st.integers(1, 4)),
        num_register_tokens=draw(st.integers(0, 5)),
        ffn_layer=draw(st.sampled_from(["mlp", "swiglu"])),
        ffn_ratio=draw(st.sampled_from([1.0, 2.0, (width + 0.5) / (64 * heads)])),
        layer_scale=draw(st.sampled_from([None, 1.0])),
        drop_path_rate=0.0,
        pos_embed_offset=draw(st.sampled_from([0.0, 0.1])),
        pos_embed_antialias=draw(st.booleans()),
    )


def held(model: ModelConfig, target: Target) -> ModelConfig:
    """The model, or the nearest one that the format has."""
    if target in ("ours", "timm"):
        return model
    ratio = 2.0 if target == "huggingface" else model.ffn_ratio
    return replace(model, img_width=None, ffn_ratio=ratio)


def is_refused(model: ModelConfig, target: Target) -> bool:
    """Whether the format lacks such models, or would lose the mask token."""
    rows, columns = position_grid(model)
    wide, odd = rows != columns, model.ffn_ratio % 1 != 0
    return target == "timm" or (wide and target != "ours") or (odd and target == "huggingface")


@pytest.mark.parametrize("target", FORMATS)
@few
@given(model=models(), dtype=DTYPES, seed=st.integers(0, 9), split=st.booleans(), data=st.data())
def test_there_and_back_is_the_identity(target, model, dtype, seed, split, data):
    model = held(model, target)
    state = {name: tensor.to(dtype) for name, tensor in random_state(model, seed).items()}
    chunks = data.draw(st.integers(1, model.depth))
    named = write_layout(state, model, target, chunks, split and model.ffn_layer == "swiglu")
    back = read_backbone(named, described=model)
    assert equal(back.state, as_held(state, model, (target,))) and back.model == model


@pytest.mark.parametrize("target", FORMATS)
@few
@given(model=models())
def test_names_and_shapes_alone_tell_what_is_written_again(target, model):
    """What a stranger makes of a file of ours, and of what is written from that: the same."""
    model = held(replace(model, img_width=None), target)  # a grid that is not square is in no shape
    named = write_layout(random_state(model), model, target, 1)
    first = read_backbone(named)
    again = write_layout(first.state, first.model, target, 1)
    assert equal(again, named)
    assert read_backbone(again).model == first.model


@few
@given(model=models(), dtype=DTYPES, number=st.integers(1, 9), seed=st.integers(0, 9))
def test_what_asks_for_nothing_changes_nothing(model, dtype, number, seed):
    state = {name: tensor.to(dtype) for name, tensor in random_state(model, seed).items()}
    rows, columns = (cells * model.patch_size for cells in position_grid(model))
    square = replace(model, img_width=None if rows == columns else columns)  # one form of a square grid
    for changed, found in (
        resize_positions(state, model, (rows, columns)),
        resize_patch(state, model, model.patch_size),
    ):
        assert equal(changed, state) and found == square
    changed, found = resize_channels(state, model, model.in_channels)
    assert equal(changed, state) and found == model
    more, larger = add_registers(state, model, number, seed)
    changed, found = drop_registers(more, larger, keep=model.num_register_tokens)
    assert equal(changed, state) and found == model


@few
@given(model=models(), dtype=DTYPES, weights=st.lists(st.floats(0, 1e300), min_size=1, max_size=6))
def test_the_average_of_equal_weights_is_these(model, dtype, weights):
    state = {name: tensor.to(dtype) for name, tensor in random_state(model).items()}
    found = average([state] * len(weights), [1.0, *weights[1:]])
    if dtype != torch.float64:  # sums are in float64, so they round only there
        assert equal(found, state)
    for name, tensor in state.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-15 * len(weights), atol=0)


def refusals(model: ModelConfig):
    """Operations that must be refused, whatever the model."""
    beyond = st.one_of(st.integers(-3, 0), st.integers(MAX_SIZE + 1, 10**9))
    odd = st.integers(1, 40).filter(lambda pixels: pixels % model.patch_size or pixels < model.patch_size)
    side = st.one_of(beyond, odd) if model.patch_size > 1 else beyond
    return st.one_of(
        st.tuples(st.just(resize_positions), st.tuples(side, st.just(model.patch_size))),
        st.tuples(st.just(resize_positions), st.tuples(st.just(model.patch_size), side)),
        st.tuples(st.just(resize_patch), st.one_of(st.integers(-3, 0), st.integers(MAX_PATCH + 1, 10**9))),
        st.tuples(
            st.just(resize_channels), st.one_of(st.integers(-3, 0), st.integers(MAX_CHANNELS + 1, 10**9))
        ),
        st.tuples(
            st.just(add_registers), st.one_of(st.integers(-3, 0), st.integers(MAX_REGISTERS + 1, 10**9))
        ),
        st.tuples(st.just(drop_registers), st.integers(model.num_register_tokens, 10**9)),
    )


@few
@given(model=models(), target=st.sampled_from(FORMATS), data=st.data())
def test_what_is_refused_leaves_no_file(model, target, data):
    operation, argument = data.draw(refusals(model))
    state = random_state(model)
    with TemporaryDirectory() as name:
        folder = Path(name)
        source = write_export(folder / "a.safetensors", state, model, {})
        before = {path: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(InputError):
            transform(source, lambda s, m: operation(s, m, argument), Order(folder / "b" / "b.safetensors"))
        if is_refused(model, target):
            with pytest.raises(InputError):
                convert(source, target, Order(folder / "c" / place(folder, target).name), chunks=1)
        assert {path: path.read_bytes() for path in folder.iterdir()} == before
