"""Whole runs on real shards: exact resume after a kill; workers and accumulation change nothing."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pretrain.command_line import STOPPED
from pretrain.config.load import load_config, save_config
from pretrain.config.schema import Config
from pretrain.data.loader import TrainLoader
from pretrain.errors import InputError, TrainingError
from pretrain.export import read_export
from pretrain.models.vit import VisionTransformer
from pretrain.run.checkpoint import Checkpoints
from pretrain.train import build, main

ROOT = Path(__file__).parent.parent
STEPS = 12


def config(shards: Path, run: Path, *overrides: str) -> Config:
    """The debugging recipe (registers, SwiGLU, Sinkhorn, two heads, drop path) on the digits, few steps."""
    return load_config(
        ROOT / "configs" / "debug_cpu.yaml",
        [
            f"run.dir={run}",
            f"run.steps={STEPS}",
            f"data.shards=[{shards}/train-*.tar]",
            "data.workers=0",
            "data.group_size=4",
            "optim.global_batch_size=16",
            "optim.warmup_steps=2",
            "checkpoint.every=4",
            "log.every=1",
            "log.tensorboard=false",
            "log.knn.train=[]",
            "log.knn.test=[]",
            *overrides,
        ],
    )


RMLP = (
    "dino_head.kind=rmlp",
    "ibot_head.kind=rmlp",
    "loss.centering=softmax",
    "rmlp.outputs=64",
    "rmlp.schedule=cosine",
    "rmlp.amplitude_end=1",
    "rmlp.start_step=6",
)


SWAV = (
    *("method.kind=swav", "method.queue=48", "method.queue_start_step=3", "mask.probability=0"),
    *("dino_head.norm_last_layer=true", "loss.ibot_weight=0", "ibot_head.shared=true"),
    *("ibot_head.prototypes=65536", "ibot_head.hidden_dim=2048", "ibot_head.bottleneck_dim=256"),
    *("teacher.momentum=0", "teacher.final_momentum=0"),
)


def tensors(cfg: Config) -> dict[str, torch.Tensor]:
    """Everything in a run's newest checkpoint: both branches, centres, optimizer."""
    run = build(cfg)
    assert run.step == cfg.run.steps
    return {f"{part}/{k}": v for part, named in run.engine.state_dict().items() for k, v in named.items()}


def metric_lines(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timing = ("images_per_s", "seconds/", "loader/")
    return [{k: v for k, v in line.items() if not k.startswith(timing)} for line in lines]


def start(cfg: Config, path: Path) -> subprocess.Popen:
    save_config(cfg, path)
    with path.with_suffix(".log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "pretrain", str(path)], stdout=log, stderr=log, cwd=ROOT
        )


def signal_after(process: subprocess.Popen, metrics: Path, lines: int, number: signal.Signals) -> None:
    """Send a signal as soon as the run has written that many metric lines."""
    deadline = time.monotonic() + 120
    while not metrics.exists() or metrics.read_text().count("\n") < lines:
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)


@pytest.mark.parametrize("heads", [(), RMLP, SWAV], ids=["mlp", "rmlp", "swav"])
def test_a_killed_run_continues_bit_for_bit(shards, tmp_path, heads):
    whole = config(shards, tmp_path / "whole", *heads)
    assert main(whole) == 0

    killed = config(shards, tmp_path / "killed", "data.workers=1", *heads)
    process = start(killed, tmp_path / "killed.yaml")
    lines = random.randint(1, STEPS - 2)
    signal_after(process, tmp_path / "killed" / "metrics.jsonl", lines, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "checkpoints" / f"step_{STEPS:08d}").exists()
    assert main(replace(killed, data=replace(killed.data, workers=0))) == 0

    expected, actual = tensors(whole), tensors(killed)
    assert expected.keys() == actual.keys()
    assert [key for key, value in expected.items() if not torch.equal(value, actual[key])] == []
    assert metric_lines(tmp_path / "killed") == metric_lines(tmp_path / "whole")


def test_accumulation_changes_nothing_but_rounding(shards, tmp_path):
    # LayerScale 1: at 1e-5 the class tokens of all images agree to six digits, and KoLeo sees the rounding
    results = []
    for parts in (1, 2, 4):
        split = f"engine.accumulation_steps={parts}"
        cfg = config(shards, tmp_path / str(parts), split, "model.layer_scale=1.0")
        assert main(cfg) == 0
        results.append(metric_lines(tmp_path / str(parts)))
    for other in results[1:]:
        for expected, actual in zip(results[0], other, strict=True):
            whole_batch = [k for k in expected if not k.startswith("signal/")]  # those see one micro-batch
            assert [actual[k] for k in whole_batch] == pytest.approx(
                [expected[k] for k in whole_batch], rel=1e-5
            )


def test_a_finished_run_says_so(shards, tmp_path, capsys):
    cfg = config(shards, tmp_path / "run", "run.steps=3")
    assert main(cfg) == 0
    capsys.readouterr()
    assert main(cfg) == 0
    assert "finished at step 3" in capsys.readouterr().out


def test_the_export_is_the_teacher(shards, tmp_path):
    cfg = config(shards, tmp_path / "run", "run.steps=3")
    main(cfg)
    export = read_export(tmp_path / "run" / "exports" / "teacher_step_00000003.safetensors")
    model = VisionTransformer(export.model)
    model.load_state_dict(export.state)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected, actual = build(cfg).engine.features(images), model([images])[0]
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


def test_a_run_killed_before_its_last_checkpoint_still_exports(shards, tmp_path, monkeypatch):
    cfg = config(shards, tmp_path / "run", "run.steps=4")
    save = Checkpoints.save

    def killed(self, step, *rest):
        raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        main(cfg)
    monkeypatch.setattr(Checkpoints, "save", save)
    exports = tmp_path / "run" / "exports"
    for path in exports.iterdir():
        path.unlink()
    assert main(cfg) == 0
    assert (exports / "teacher_step_00000004.safetensors").exists()


def test_another_data_set_is_named_at_the_next_start(shards, tmp_path, capsys):
    main(config(shards, tmp_path / "run", "run.steps=3"))
    build(config(shards, tmp_path / "run", "run.steps=6", f"data.shards=[{shards}/test-*.tar]"))
    assert "seed 0, num_samples 1400 -> seed 0, num_samples 397; " in capsys.readouterr().out


def test_a_config_of_another_version_does_not_stop_the_run(shards, tmp_path, capsys):
    cfg = config(shards, tmp_path / "run", "run.steps=3")
    main(cfg)
    with (tmp_path / "run" / "config.yaml").open("a") as file:
        file.write("\nold_section: {key: 1}\n")
    assert main(replace(cfg, run=replace(cfg.run, steps=4))) == 0
    assert "which cannot be compared" in capsys.readouterr().out


def test_a_run_starts_from_an_export(shards, tmp_path):
    main(config(shards, tmp_path / "first", "run.steps=3"))
    path = tmp_path / "first" / "exports" / "teacher_step_00000003.safetensors"
    second = build(
        config(shards, tmp_path / "second", f"model.init_from={path}", *RMLP[:-1], "rmlp.start_step=0")
    )
    assert second.step == 0
    for branch in ("student", "teacher"):
        weights = second.engine.full_state_dict(branch)
        for key, value in read_export(path).state.items():
            assert torch.equal(weights[f"backbone.{key}"], value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.embed_dim=36", "holds another model"),
        ("model.num_heads=1", "model.num_heads is 1 here and 3 there"),
        ("model.num_register_tokens=0", "model.num_register_tokens is 0 here and 4 there"),
        ("model.pos_embed_offset=0.0", "model.pos_embed_offset is 0 here and 0.1 there"),
        ("model.depth=3", "model.depth is 3 here and 2 there"),
    ],
)
def test_an_export_of_another_model_is_refused(shards, tmp_path, override, message):
    main(config(shards, tmp_path / "first", "run.steps=3"))
    path = tmp_path / "first" / "exports" / "teacher_step_00000003.safetensors"
    with pytest.raises(InputError, match=f"^model.init_from: {path} .*{message}"):
        build(config(shards, tmp_path / "second", f"model.init_from={path}", override))
    assert not (tmp_path / "second" / "config.yaml").exists()


def test_another_global_batch_goes_on_at_the_same_position(shards, tmp_path, capsys):
    main(config(shards, tmp_path / "run", "run.steps=3"))
    run = build(config(shards, tmp_path / "run", "run.steps=6", "optim.global_batch_size=8"))
    assert "16 -> 8 images a step; reading goes on at position 48" in capsys.readouterr().out
    assert next(run.loader.steps(3, 4))[1][0].position == 48


def test_data_that_cannot_be_read_any_more_end_the_run_with_a_checkpoint(shards, tmp_path):
    folder = tmp_path / "shards"
    shutil.copytree(shards, folder)
    cfg = config(folder, tmp_path / "run", "run.steps=1000", "data.open_shards=1", "checkpoint.every=1000")
    process = start(cfg, tmp_path / "run.yaml")
    signal_after(process, tmp_path / "run" / "metrics.jsonl", 3, signal.SIGCONT)
    for shard in folder.glob("train-*.tar"):
        shard.write_bytes(bytes(1024))
    assert process.wait() == 3
    assert "was replaced while it is in use" in (tmp_path / "run.log").read_text()
    newest = max((tmp_path / "run" / "checkpoints").glob("step_*"))
    assert (newest / "COMPLETE").exists() and 3 <= int(newest.name[5:]) < 1000


def test_a_signal_saves_at_the_step_boundary_and_the_run_continues(shards, tmp_path):
    whole = config(shards, tmp_path / "whole", "checkpoint.every=1000")
    stopped = replace(whole, run=replace(whole.run, dir=str(tmp_path / "stopped")))
    assert main(whole) == 0
    process = start(stopped, tmp_path / "stopped.yaml")
    signal_after(process, tmp_path / "stopped" / "metrics.jsonl", 3, signal.SIGUSR2)
    assert process.wait() == STOPPED, (tmp_path / "stopped.log").read_text()
    assert "stopped by SIGUSR2; saved" in (tmp_path / "stopped.log").read_text()
    saved = len(metric_lines(tmp_path / "stopped"))
    assert 3 <= saved < STEPS
    assert (tmp_path / "stopped" / "checkpoints" / f"step_{saved:08d}" / "COMPLETE").exists()
    assert not (tmp_path / "stopped" / "run.lock").exists()
    assert main(stopped) == 0
    actual = tensors(stopped)
    assert all(torch.equal(value, actual[key]) for key, value in tensors(whole).items())


@pytest.mark.parametrize("key", ["log.knn.test", "log.images.shards", "log.artifacts.shards"])
def test_shards_that_are_looked_at_later_are_missed_at_the_start(shards, tmp_path, key):
    knn = (f"log.knn.train=[{shards}/train-*.tar]", f"log.knn.test=[{shards}/test-*.tar]", "log.knn.every=0")
    cfg = config(shards, tmp_path / "run", *knn, f"{key}=[{tmp_path}/none-*.tar]")
    with pytest.raises(InputError, match=f"^{key}: no shard matches"):
        build(cfg)


def test_a_second_process_on_the_run_is_refused(shards, tmp_path):
    cfg = config(shards, tmp_path / "run", "run.steps=100000", "checkpoint.every=100000")
    process = start(cfg, tmp_path / "run.yaml")
    signal_after(process, tmp_path / "run" / "metrics.jsonl", 1, signal.SIGCONT)
    with pytest.raises(InputError, match=f"process {process.pid} on .* is training in this folder"):
        main(cfg)
    assert process.poll() is None
    process.kill()
    process.wait()


def test_a_run_without_good_steps_ends_with_one_clear_error(shards, tmp_path, monkeypatch):
    steps = TrainLoader.steps

    def poisoned(self, first, last):
        for step, batches in steps(self, first, last):
            bad = [replace(b, global_crops=b.global_crops * torch.nan) for b in batches]
            yield step, bad if step >= 4 else batches

    monkeypatch.setattr(TrainLoader, "steps", poisoned)
    cfg = config(shards, tmp_path / "run", "optim.max_bad_steps=3")
    with pytest.raises(TrainingError, match=r"3 steps in a row up to step 7 .* still those of step 4"):
        main(cfg)
    lines = metric_lines(tmp_path / "run")
    assert [line["bad_steps"] for line in lines] == [0, 0, 0, 0, 1, 2]
    assert lines[4]["loss/total"] is None
    monkeypatch.undo()
    assert main(cfg) == 0  # from the checkpoint of step 4
    assert tensors(cfg)["model/guard.bad_steps"] == 0


def test_resume_from_another_run(shards, tmp_path):
    main(config(shards, tmp_path / "first", "run.steps=4"))
    source = tmp_path / "first" / "checkpoints" / "step_00000004"
    run = build(config(shards, tmp_path / "second", f"checkpoint.resume_from={source}"))
    assert run.step == 4
    first = build(config(shards, tmp_path / "first", "run.steps=4"))
    for part, named in first.engine.state_dict().items():
        for key, value in named.items():
            assert torch.equal(value, run.engine.state_dict()[part][key])


def test_changed_settings_are_named_at_the_next_start(shards, tmp_path, capsys):
    main(config(shards, tmp_path / "run", "run.steps=3"))
    main(config(shards, tmp_path / "run", "run.steps=4"))
    assert "changed since the last start: run.steps: 3 -> 4" in capsys.readouterr().out
    assert load_config(tmp_path / "run" / "config.yaml").run.steps == 4
    assert "torch" in (tmp_path / "run" / "environment.txt").read_text()
