"""Noise in place of data has the shapes of data."""

from dataclasses import replace

import pytest
import torch

from pretrain.config.schema import ModelConfig
from pretrain.data.loader import TrainLoader
from pretrain.data.synthetic import noise_batch
from tests.small import small_config


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    from pretrain.data.digits import write_digits

    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder)
    cfg = small_config()
    model = replace(cfg.model, depth=6, drop_path_rate=0.3, drop_path_uniform=False)
    assert isinstance(model, ModelConfig)
    return replace(cfg, model=model, data=replace(cfg.data, shards=[f"{folder}/train-*.tar"]))


def test_noise_has_the_shapes_of_data(cfg):
    ((_, (real,)),) = TrainLoader(cfg, torch.device("cpu"), 8).steps(0, 1)
    noise = noise_batch(cfg, 8)
    for name, value in vars(real).items():
        other = getattr(noise, name)
        if isinstance(value, torch.Tensor):
            assert other.dtype == value.dtype
            assert other.shape == value.shape or name in ("mask_indices", "mask_weights")
    assert (noise.group_size, noise.num_images) == (real.group_size, real.num_images) == (4, 8)
    assert 0 < len(noise.mask_indices) == len(noise.mask_weights) == noise.masks.sum()


def test_noise_is_uniform_and_another_position_is_other_noise(cfg):
    first, second = noise_batch(cfg, 8), noise_batch(cfg, 8, position=8)
    assert first.global_crops.float().mean() == pytest.approx(127.5, abs=2)
    assert first.global_crops.unique().numel() == 256
    assert not torch.equal(first.global_crops, second.global_crops)
    assert torch.equal(first.global_crops, noise_batch(cfg, 8).global_crops)
