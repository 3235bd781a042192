"""What a run tells: signals, times, pictures, a trace, a collapse warning."""

import gzip
import json
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pretrain.config.load import load_config
from pretrain.config.schema import Config
from pretrain.train import main

ROOT = Path(__file__).parent.parent


def config(shards: Path, run: Path, name: str, *overrides: str) -> Config:
    return load_config(
        ROOT / "configs" / f"{name}.yaml",
        [
            f"run.dir={run}",
            f"data.shards=[{shards}/train-*.tar]",
            "data.workers=0",
            "log.knn.train=[]",
            "log.knn.test=[]",
            "log.knn.every=0",
            *overrides,
        ],
    )


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_writes_signals_times_norms_pictures_and_a_trace(shards, tmp_path):
    run = tmp_path / "run"
    cfg = config(
        shards,
        run,
        "debug_cpu",
        "run.steps=7",
        "log.every=1",
        "log.norms_every=5",
        "log.profile_steps=[2,4]",
        f"log.images.shards=[{shards}/test-*.tar]",
        "log.images.number=3",
        "log.images.every=4",
    )
    assert main(cfg) == 0
    written = lines(run)
    for name in ("signal/feature_rank", "signal/prototypes_used", "signal/agreement", "signal/masked_share"):
        assert all(name in line for line in written)
    for phase in ("data", "teacher", "forward", "backward", "optimizer"):
        assert all(line[f"seconds/{phase}"] > 0 for line in written)
    with_norms = [line["step"] for line in written if "gradient_norm/backbone.blocks.1.attn" in line]
    assert with_norms == [5]

    board = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [image.step for image in board.Images("images")] == [4, 7]
    assert [point.step for point in board.Scalars("loss/total")] == list(range(1, 8))

    with gzip.open(run / "tensorboard" / "step_00000002.pt.trace.json.gz") as file:
        events = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"data", "teacher", "forward", "backward", "optimizer", "aten::addmm"} <= events


def test_a_collapsing_run_is_called_so_within_50_steps(shards, tmp_path, capsys):
    forced = ("loss.center_momentum=1.0", "loss.koleo_weight=0.0")
    cfg = config(
        shards,
        tmp_path / "run",
        "demo",
        "run.steps=50",
        "data.group_size=64",
        "optim.global_batch_size=64",
        *forced,
    )
    assert main(cfg) == 0
    assert "WARNING" in capsys.readouterr().out
