"""The formula against PyTorch's own counter, over a whole step of the real model."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pretrain.config.schema import HeadConfig, IbotHeadConfig, RmlpConfig
from pretrain.data.synthetic import noise_batch
from pretrain.dry_run import Trainer
from pretrain.run.flops import flops_per_image, masked_patches
from pretrain.run.profiling import PhaseTimer
from tests.small import small_config

CPU = torch.device("cpu")


def config(heads="mlp", **model):
    cfg = small_config(
        dino_head=HeadConfig(heads, prototypes=4096, hidden_dim=32, bottleneck_dim=16),
        rmlp=RmlpConfig(outputs=1024),
    )
    # math: the fused kernels of a CPU are invisible to the counter
    model = replace(cfg.model, attention="math", **model)
    return replace(cfg, model=model, data=replace(cfg.data, group_size=16))


CASES = {
    "mlp heads": config(),
    "randomized heads": config("rmlp"),
    "mixed heads": replace(config("mix"), rmlp=RmlpConfig(outputs=4096)),
    "swiglu, registers": config(ffn_layer="swiglu", num_register_tokens=4),
    "drop path": config(depth=6, drop_path_rate=0.4),
    "separate heads": replace(
        config(), ibot_head=IbotHeadConfig(shared=False, prototypes=8192, hidden_dim=64)
    ),
}


@pytest.mark.parametrize("cfg", CASES.values(), ids=CASES)
def test_the_formula_counts_what_a_step_does(cfg):
    images = 32
    trainer, batch = Trainer(cfg, CPU, images), noise_batch(cfg, images)
    batch = batch.normalize(torch.tensor(cfg.data.mean), torch.tensor(cfg.data.std))
    with FlopCounterMode(display=False) as counter:
        trainer.step(0, [batch], PhaseTimer(CPU))
    assert images * sum(flops_per_image(cfg)) == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_the_heads_are_counted_apart():
    small, large = (config() for _ in range(2))
    large = replace(large, dino_head=replace(large.dino_head, prototypes=8192))
    assert flops_per_image(large).backbone == flops_per_image(small).backbone
    rows = 3 * (2 + 3 + masked_patches(small)) + 2 + masked_patches(small)
    more = flops_per_image(large).heads - flops_per_image(small).heads
    assert more == pytest.approx(rows * 2 * 16 * 4096)
