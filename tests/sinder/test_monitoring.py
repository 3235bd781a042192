"""What a run logs about its teacher: the tool's numbers, under every engine, and a line about a defect."""

import io
import json
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from pretrain.config.load import load_config
from pretrain.data.writer import PackedSample, write_shards
from pretrain.export import write_export
from pretrain.report import Report
from pretrain.sinder.after_blocks import after_blocks
from pretrain.sinder.diagnosis import LayerStatistics
from pretrain.sinder.hits import patch_grid, run_block
from pretrain.sinder.monitoring import artifact_figures
from pretrain.train import build, main
from tests.engines.layout_runs import ZERO3, train, write_config
from tests.sinder.planted import BLOCK, MODELS, clean_backbone, noise, plant

KIND, IMAGES = "swiglu-registers", 8
SHARES = {"both_percent": "by_both", "by_angle_percent": "by_angle", "by_norm_percent": "by_norm"}
GREY = (
    *("data.channels=1", "model.in_channels=1", "data.mean=0.5", "data.std=0.2", "data.augment.hue=0"),
    *("data.augment.saturation=0", "data.augment.grayscale_probability=0"),
)


@pytest.fixture(scope="module")
def world(tmp_path_factory, photos):
    """Weights with a planted defect, images as shards, and the settings of a run with both."""
    folder = tmp_path_factory.mktemp("monitored")
    backbone = clean_backbone(MODELS[KIND])
    plant(backbone)
    export = write_export(folder / "start.safetensors", backbone.state_dict(), MODELS[KIND], {})
    files = sorted(photos.iterdir())[: 3 * IMAGES]
    samples = [PackedSample(file.stem, "png", file.read_bytes(), None, {}) for file in files]
    watched = write_shards(samples, folder, "train", IMAGES)[0]
    model = MODELS[KIND]
    settings = [
        *("run.steps=2", "optim.warmup_steps=1", f"model.embed_dim={model.embed_dim}"),
        *(f"model.depth={model.depth}", f"model.num_heads={model.num_heads}", "model.drop_path_rate=0"),
        *(f"model.img_size={model.img_size}", f"data.global_crops.size={model.img_size}"),
        *("data.open_shards=1", f"model.init_from={export}", f"log.artifacts.shards={watched}"),
        *(f"log.artifacts.number={IMAGES}", "log.artifacts.every=1"),
    ]
    return SimpleNamespace(folder=folder, settings=settings, watched=watched)


@pytest.fixture(scope="module")
def single(world):
    """What a run on one device prints."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        path = write_config(world.folder, world.folder / "single", "single", *world.settings)
        assert main(load_config(path)) == 0
    return printed.getvalue()


def logged(run: Path) -> dict[int, dict[str, float]]:
    """What was written about artifacts, by step."""
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        line["step"]: {name: value for name, value in line.items() if name.startswith("artifacts")}
        for line in lines
        if any(name.startswith("artifacts") for name in line)
    }


def test_a_defect_in_the_first_weights_is_said_at_the_first_look(single, world):
    assert f"step 1: patch tokens stand out: after block {BLOCK}, " in single
    found = logged(world.folder / "single")
    assert list(found) == [1, 2]
    assert found[1]["artifacts/worst_block"] >= BLOCK and found[1]["artifacts/worst_both_percent"] > 0.5
    assert found[1]["artifacts/worst_norm_ratio"] > 3


def test_the_log_says_what_the_tool_says_of_the_export(single, world, sinder):
    run = world.folder / "single"
    export = run / "exports" / "teacher_step_00000002.safetensors"
    source = ("--images", world.watched, "--number", IMAGES, "--batch-size", 3)
    done = sinder("diagnose", export, *source, "--json")
    layers, found = json.loads(done.out)["layers"], logged(run)[2]
    expected = {
        f"artifacts_blocks/{name}/block_{layer['block']:02d}": 100 * layer[share]
        for name, share in SHARES.items()
        for layer in layers
    }
    expected |= {f"artifacts_blocks/norm_ratio/block_{la['block']:02d}": la["norm_ratio"] for la in layers}
    worst = max(layers, key=lambda layer: layer["by_both"])
    expected["artifacts/worst_both_percent"] = 100 * worst["by_both"]
    expected["artifacts/worst_norm_ratio"] = worst["norm_ratio"]
    expected["artifacts/worst_block"] = worst["block"]
    assert found == pytest.approx(expected, rel=1e-6)


def assert_same(found: dict[int, dict[str, float]], expected: dict[int, dict[str, float]]) -> None:
    assert list(found) == list(expected)
    for step, figures in expected.items():
        assert found[step] == pytest.approx(figures, rel=1e-4)


@pytest.mark.dist
def test_copies_and_shards_show_the_same(single, world):
    folder = world.folder
    paths = [write_config(folder, folder / kind, kind, *world.settings) for kind in ("ddp2", "fsdp2")]
    train(paths, folder, "ddp2")
    for kind in ("ddp2", "fsdp2"):
        assert_same(logged(folder / kind), logged(folder / "single"))
    assert (folder / "0.out").read_text().count("step 1: patch tokens stand out: ") == 2
    assert "stand out" not in (folder / "1.out").read_text()


@pytest.mark.dist
@pytest.mark.drill
def test_zero_3_shows_the_same(single, world):
    folder = world.folder / "deepspeed"
    folder.mkdir()
    train([write_config(world.folder, folder / "zero3", "ddp2", *world.settings, *ZERO3)], folder, "ddp2")
    assert_same(logged(folder / "zero3"), logged(world.folder / "single"))


@pytest.mark.parametrize("channels", [GREY, ()], ids=["grey", "rgb"])
def test_small_grids_have_no_figure_by_angle_and_damaged_weights_none(channels, shards, tmp_path, capsys):
    test = f"log.artifacts.shards={shards}/test-*.tar"
    cfg = load_config(write_config(shards, tmp_path / "run", "single", test, *channels))
    run = build(cfg)
    with Report(cfg, run.engine, 0) as report:
        report.look_for_artifacts(1)
        with torch.no_grad():
            run.engine.teacher_backbone().blocks[1].mlp.w3.weight[3, 2] = torch.nan
        report.look_for_artifacts(2)
    (found,) = logged(tmp_path / "run").values()
    names = {name.split("/")[1] for name in found if name.startswith("artifacts_blocks/")}
    assert names == {"both_percent", "by_norm_percent", "norm_ratio"}
    lines = [line for line in capsys.readouterr().out.splitlines() if "log.artifacts" in line]
    assert len(lines) == 1 and lines[0].startswith("step 2: log.artifacts: blocks.1.mlp.w3.weight: holds ")


def test_where_nothing_stands_out_no_block_is_the_worst():
    clean = [LayerStatistics(0.01, 0.0, 0.0, 1.0, 0.0, 0.0)] * 2
    assert artifact_figures(clean, 256) == {
        "artifacts/worst_both_percent": 0.0,
        "artifacts/worst_norm_ratio": 1.0,
        **{f"artifacts_blocks/both_percent/block_0{i}": 0.0 for i in range(2)},
        **{f"artifacts_blocks/by_angle_percent/block_0{i}": 1.0 for i in range(2)},
        **{f"artifacts_blocks/by_norm_percent/block_0{i}": 0.0 for i in range(2)},
        **{f"artifacts_blocks/norm_ratio/block_0{i}": 1.0 for i in range(2)},
    }


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
@torch.no_grad()
def test_every_block_is_seen_and_none_compiled_for_it(compiled):
    backbone, images, compiler = clean_backbone(MODELS[KIND]), noise(2, seed=0), CompileCounter()
    tokens, expected = backbone.embed(images), []
    for index in range(len(backbone.blocks)):
        tokens = run_block(backbone, index, tokens)
        expected.append(patch_grid(backbone, tokens, images))
    for block in backbone.blocks if compiled else ():
        block.compile(backend=compiler)
    backbone([images[:1]])
    before = compiler.frame_count
    assert (before > 0) == compiled
    for _ in range(2):  # hooks of the first time are gone
        seen: dict[int, Tensor] = {}
        after_blocks(backbone, images, seen.__setitem__)
        assert list(seen) == list(range(len(expected)))
        for index, patches in seen.items():
            torch.testing.assert_close(patches, expected[index])
    assert compiler.frame_count == before
