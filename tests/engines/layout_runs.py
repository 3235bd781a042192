"""Short runs of one recipe on the ranks of several layouts, by the command line."""

from pathlib import Path

from pretrain.config.load import load_config, save_config
from tests.rank_processes import ROOT, run_ranks

STEPS = 6
ZERO3 = ("engine.kind=deepspeed", "engine.deepspeed.stage=3")
LAYOUTS = {"single": ("single", 1), "ddp2": ("ddp", 2), "fsdp2": ("fsdp2", 2), "fsdp4": ("fsdp2", 4)}


def write_config(shards: Path, run: Path, layout: str, *overrides: str) -> str:
    """The path of a config for a run on the ranks of a layout."""
    kind, ranks = LAYOUTS[layout]
    settings = [
        *(f"run.dir={run}", f"run.steps={STEPS}", f"data.shards=[{shards}/train-*.tar]"),
        *(f"engine.kind={kind}", f"engine.accumulation_steps={4 // ranks}", "data.workers=0"),
        *("data.group_size=4", "optim.global_batch_size=16", "optim.warmup_steps=2", "log.every=1"),
        *("checkpoint.every=3", "log.tensorboard=false", "log.knn.train=[]", "log.knn.test=[]"),
        *("model.layer_scale=1.0", *overrides),
    ]
    path = run.with_suffix(".yaml")
    save_config(load_config(ROOT / "configs" / "debug_cpu.yaml", settings), path)
    return str(path)


def train(paths: list[str], folder: Path, layout: str) -> None:
    """Train configs one after another on the ranks of a layout."""
    for rank in run_ranks(["-m", "tests.engines.several_runs", *paths], folder, LAYOUTS[layout][1]):
        assert rank.status == 0, rank.err
