import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pretrain.analysis.crops import HIDDEN, crop_picture
from pretrain.analysis.sheet import GAP, HEADER
from pretrain.batch import Batch
from pretrain.errors import InputError
from tools.loader import parse

ROOT = Path(__file__).parents[2]


def run_tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/loader.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_it_measures_and_draws_without_a_run_folder(shard_folder: Path, tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.png"
    settings = [f"data.shards=[{shard_folder}/train-*.tar]", f"run.dir={tmp_path / 'run'}", "data.workers=1"]
    settings += ["data.group_size=4", "optim.global_batch_size=8"]  # fewer images than the sheet has rows
    done = run_tool("configs/debug_cpu.yaml", *settings, "--images", "32", "--sheet", str(sheet))
    assert done.returncode == 0, done.stderr
    for text in (
        "70 samples; 1 workers",
        "images/s over 32 images",
        "decode",
        "waiting for a slot",
        "corrupt samples: 0",
    ):
        assert text in done.stdout
    assert "the crops of the first 4 images" in done.stdout
    with Image.open(sheet) as image:
        assert image.size[0] > 300
    assert not (tmp_path / "run").exists()


def test_wrong_input_is_one_line() -> None:
    for arguments in (["configs/nothing.yaml"], ["configs/debug_cpu.yaml", "data.shards=[/none/*.tar]"]):
        done = run_tool(*arguments)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("loader.py: ")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--sheet", "crops.xyz", "--sheet crops.xyz: no kind of picture ends so; name it crops.png"),
        ("--sheet", "crops", "--sheet crops: no kind of picture ends so; name it crops.png"),
        ("--sheet", "gone/crops.png", "--sheet gone/crops.png: there is no folder gone; make it"),
        ("--images", "0", "--images 0: must be at least 1"),
    ],
)
def test_wrong_options_are_told_before_the_time_is_spent(
    option: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["loader.py", "configs/debug_cpu.yaml", option, value])
    with pytest.raises(InputError, match=f"^command line: {message}"):
        parse()


def test_the_picture_shows_what_the_student_sees() -> None:
    globals_ = torch.full((4, 3, 8, 8), 200, dtype=torch.uint8)
    masks = torch.zeros(4, 4, dtype=torch.bool)
    masks[0, 3] = True  # the lower right patch of the first crop of the first image
    batch = Batch(
        global_crops=globals_,
        local_crops=torch.full((2, 3, 4, 4), 100, dtype=torch.uint8),
        masks=masks,
        mask_indices=torch.tensor([3]),
        mask_weights=torch.ones(1),
        drop_global=None,
        drop_local=None,
        group_size=2,
        position=0,
    )
    pixels = crop_picture(batch, count=1, patch_size=4)
    size = 128
    assert pixels.shape == (3, HEADER + size + GAP, 5 * (size + GAP))
    row = pixels[0, HEADER:, :]
    cells = [row[:size, i * (size + GAP) : i * (size + GAP) + size].numpy() for i in range(5)]
    assert [np.unique(cell).tolist() for cell in (cells[0], cells[1], cells[3], cells[4])] == [
        [200],
        [200],
        [200],
        [100],
    ]
    assert (cells[2][64:, 64:] == round(200 * HIDDEN)).all() and (cells[2][:64] == 200).all()
