"""What `engine.deepspeed.extra` may say, and how DeepSpeed's configuration is made."""

from pathlib import Path

import pytest

from pretrain.config.deepspeed_extra import FIXED, OWNED
from pretrain.config.load import ConfigError, config_text, load_config
from pretrain.config.schema import DeepspeedConfig, EngineConfig, OptimConfig
from pretrain.engines.deepspeed_config import deepspeed_settings, teacher_settings

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("key", [*OWNED, *FIXED, "optimizer.type", "bf16.enabled"])
def test_what_another_setting_says_is_refused_with_one_line(key: str) -> None:
    with pytest.raises(ConfigError, match=r"engine\.deepspeed\.extra: .*remove it") as error:
        load_config(ROOT / "configs/demo.yaml", [f"engine.deepspeed.extra.{key}=1"])
    assert "\n" not in str(error.value)


def test_extra_survives_a_round_trip_and_is_merged_last(tmp_path: Path) -> None:
    extra = ["engine.deepspeed.extra.zero_optimization.reduce_bucket_size=7", "engine.deepspeed.stage=3"]
    cfg = load_config(ROOT / "configs/demo.yaml", extra)
    copy = tmp_path / "copy.yaml"
    copy.write_text(config_text(cfg))
    assert load_config(copy) == cfg
    zero = deepspeed_settings(cfg.optim, cfg.engine, 1)["zero_optimization"]
    assert (zero["reduce_bucket_size"], zero["stage"], zero["overlap_comm"]) == (7, 3, False)


def test_extra_is_a_mapping() -> None:
    with pytest.raises(ConfigError, match=r"engine\.deepspeed\.extra: needs a mapping"):
        load_config(ROOT / "configs/demo.yaml", ["engine.deepspeed.extra=3"])


def test_sizes_are_filled_from_ours() -> None:
    settings = deepspeed_settings(OptimConfig(global_batch_size=96), EngineConfig(accumulation_steps=3), 4)
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    assert [settings[name] for name in names] == [96, 8, 3]
    assert settings["gradient_clipping"] == 0


def test_nothing_of_a_partitioned_teacher_stays_gathered_whatever_extra_says() -> None:
    persist = {"zero_optimization": {"stage3_param_persistence_threshold": 100}}
    engine = EngineConfig(deepspeed=DeepspeedConfig(3, "cpu", persist))
    student = deepspeed_settings(OptimConfig(), engine, 1)
    zero = teacher_settings(student)["zero_optimization"]
    assert student["zero_optimization"]["stage3_param_persistence_threshold"] == 100
    assert zero["stage3_param_persistence_threshold"] == zero["stage3_max_reuse_distance"] == 0
    assert "offload_optimizer" not in zero
