"""Attention over all crops at once: sequence bounds and masks against SDPA by group, what a CPU cannot run.

The kernels themselves run on GPUs only (`make test-gpu`). Here PyTorch checks the call of its own by shapes.
"""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.data.drop_path import drop_subsets
from pretrain.engines.activations import checkpoint_activations
from pretrain.errors import InputError
from pretrain.method.branch import SSLBranch
from pretrain.models.attention import attend_by_group, attend_sdpa, attention_function, resolve_backend
from pretrain.models.init import init_weights
from pretrain.models.packed_attention import (
    attend_varlen,
    block_mask,
    sequence_bounds,
    try_kernel,
)
from pretrain.models.packed_attention import kernel as packed_kernel
from pretrain.models.packing import Layout, drop_path_subsets
from pretrain.models.vit import VisionTransformer
from pretrain.seeding import numpy_stream
from tests.small import random_batch, small_config

CPU = torch.device("cpu")
CROPS = Layout((4, 6), (17, 5))
KERNELS = ["varlen", "xformers"]


def kept_layouts():
    """The layouts of the blocks under drop path, of crops as in `CROPS`."""
    rates, rng = [0.0, 0.3, 0.6], numpy_stream(0, "test")
    rows = [torch.from_numpy(drop_subsets(rates, count, rng)) for count in CROPS.counts]
    return [pair[0].layout for pair in drop_path_subsets(rows, rates, CROPS, num_shares=1)]


LAYOUTS = [*dict.fromkeys([CROPS, Layout((3,), (7,)), Layout((1, 1, 2), (1, 4, 4)), *kept_layouts()])]


def packed(layout, dtype=torch.float32, device=CPU, width=8):
    generator = torch.Generator().manual_seed(0)
    shape = (sum(layout.tokens), 3, 2, width)
    return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()


def test_drop_path_gives_layouts_of_its_own():
    assert len(LAYOUTS) > 4 and all(layout.lengths == CROPS.lengths for layout in LAYOUTS[3:])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_between_two_bounds_lies_a_sequence(layout):
    bounds, qkv = sequence_bounds(layout, CPU), packed(layout)
    assert bounds.dtype == torch.int32 and int(bounds.diff().max()) == max(layout.lengths)
    outputs = []
    for begin, end in pairwise(bounds.tolist()):
        q, k, v = qkv[begin:end].permute(1, 2, 0, 3)  # each (H, N, d)
        mixed = (q @ k.mT * 8**-0.5).softmax(-1) @ v
        outputs.append(mixed.transpose(0, 1).flatten(1))
    expected = attend_by_group(attend_sdpa, qkv, layout)
    torch.testing.assert_close(torch.cat(outputs), expected)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_mask_of_xformers_lets_a_token_see_its_sequence(layout):
    qkv = packed(layout)
    mask = block_mask(layout, CPU)
    tokens = len(qkv)
    q, k, v = qkv.permute(1, 2, 0, 3)  # each (H, T, d), all sequences in one
    mixed = scaled_dot_product_attention(q, k, v, attn_mask=mask.materialize((tokens, tokens)))
    expected = attend_by_group(attend_sdpa, qkv, layout)
    torch.testing.assert_close(mixed.transpose(0, 1).flatten(1), expected)
    assert mask.q_seqinfo.seqstart.tolist() == sequence_bounds(layout, CPU).tolist()


def test_bounds_and_mask_are_made_once_for_a_layout():
    again = Layout((*CROPS.counts,), (*CROPS.lengths,))
    assert sequence_bounds(CROPS, CPU) is sequence_bounds(again, CPU)
    assert block_mask(CROPS, CPU) is block_mask(again, CPU)


def test_a_compiled_block_gets_the_bounds_of_its_layout():
    def shifted(x, layout):
        return x + sequence_bounds(layout, x.device).sum()

    compiled = torch.compile(shifted, backend="eager", fullgraph=True)
    for layout in (CROPS, Layout((2,), (3,)), CROPS):
        expected = shifted(torch.zeros(2), layout)
        assert torch.equal(compiled(torch.zeros(2), layout), expected)


class Calls(TorchDispatchMode):
    """Counts the operations of a name."""

    def __init__(self, name):
        super().__init__()
        self.name, self.count = name, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += str(func) == self.name
        return func(*args, **(kwargs or {}))


@pytest.fixture
def fake():
    """Tensors without data: the shapes, types and devices of operations are checked, nothing is computed."""
    sequence_bounds(CROPS, CPU)  # a real one, to be reused by other tests
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


def test_varlen_takes_and_returns_the_shapes_and_types_of_the_packed_tensor(fake):
    qkv = torch.empty(sum(CROPS.tokens), 3, 2, 8, dtype=torch.bfloat16, requires_grad=True)
    output = attend_varlen(qkv, CROPS)
    expected = attend_by_group(attend_sdpa, qkv, CROPS)
    assert (output.shape, output.dtype) == (expected.shape, expected.dtype)
    output.sum().backward()
    assert (qkv.grad.shape, qkv.grad.dtype) == (qkv.shape, qkv.dtype)


@pytest.mark.parametrize(("mode", "calls"), [("none", 2), ("selective", 2), ("full", 4)])
def test_selective_checkpointing_keeps_the_result_of_varlen(fake, mode, calls):
    model = VisionTransformer(small_config().model)  # of two blocks
    for block in model.blocks:
        block.attn.attend = attend_varlen
    checkpoint_activations(model.blocks, mode)
    x = torch.empty(sum(CROPS.tokens), 24, requires_grad=True)
    with Calls("torch_attn._varlen_attn.default") as counter:
        for block in model.blocks:
            x = block(x, CROPS)
        x.sum().backward()
    assert counter.count == calls


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_looks_into_a_model_on_a_cpu_or_in_fp32_gets_sdpa(kernel):
    qkv = packed(CROPS)
    expected = attention_function("sdpa")(qkv, CROPS)
    assert torch.equal(attention_function(kernel)(qkv, CROPS), expected)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("device", "bf16"), [("cpu", True), ("cpu", False), ("cuda", False)])
def test_a_device_or_precision_without_the_kernel_is_refused(kernel, device, bf16):
    wanted = (
        f"model.attention={kernel} needs a GPU and engine.precision=bf16, not {device} in .*; set model.a"
    )
    with pytest.raises(InputError, match=wanted):
        resolve_backend(kernel, torch.device(device), bf16)


@pytest.mark.parametrize(
    ("kernel", "why"),
    [("varlen", "Could not run"), ("xformers", "No operator")],
)
def test_a_kernel_that_does_not_run_is_one_line(kernel, why):
    with pytest.raises(InputError, match=f"model.attention={kernel} does not run here .{why}") as error:
        try_kernel(kernel, CPU)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    assert str(error.value).endswith("set model.attention=auto")


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_on_a_gpu_all_sequences_at_once_equal_sdpa_by_group(kernel, layout):
    results = []
    for function in (packed_kernel(kernel), lambda qkv, layout: attend_by_group(attend_sdpa, qkv, layout)):
        qkv = packed(layout, torch.bfloat16, torch.device("cuda"), width=64)
        output = function(qkv, layout)
        output.float().square().sum().backward()
        results.append((output.detach().float(), qkv.grad.float()))
    for mine, theirs in zip(*results, strict=True):
        assert (mine - theirs).norm() < 0.01 * theirs.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", KERNELS)
def test_on_a_gpu_a_model_is_as_near_to_fp32_as_with_sdpa(kernel):
    device, cfg = torch.device("cuda"), small_config()
    cfg = replace(cfg, model=replace(cfg.model, embed_dim=128, drop_path_rate=0.4))
    batch = random_batch(cfg, 4).to(device)
    found = []
    for backend, bf16 in (("sdpa", False), ("sdpa", True), (kernel, True)):
        branch = SSLBranch(cfg, "student", resolve_backend(backend, device, bf16))
        init_weights(branch, seed=0)
        branch.to(device)
        with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
            output = branch(batch)
        sum(value.float().square().sum() for value in output.values()).backward()
        found.append((output["cls"].float(), branch.backbone.pos_embed.grad))
    for exact, sdpa, mine in zip(*found, strict=True):
        assert 0 < (mine - exact).norm() < 1.5 * (sdpa - exact).norm()
