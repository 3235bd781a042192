"""Peak memory and time of surgery's verbs on random weights of a whole model, each in a process of its own.

    python benchmarks/surgery.py --arch vit_large
    python benchmarks/surgery.py --arch vit_giant2 --folder /path/on/a/disk    # needs about 20 GB there

Linux only: memory is read from /proc while a verb runs. `peak` counts every page in memory, those of mapped
files too, which the system takes back when it needs them; `own` leaves them out. The verbs run as a user
starts them, so that Python and torch (about 0.3 GB, 3 s) are in every figure. The last line is one JSON
object.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from pretrain.command_line import Parser, exit_status
from pretrain.config.schema import ModelConfig
from pretrain.errors import InputError
from pretrain.export import write_export
from pretrain.models.vit import VisionTransformer

TOOL = Path(__file__).parents[1] / "tools" / "surgery.py"
MODELS = {
    "vit_small": ModelConfig(arch="vit_small", patch_size=14, img_size=518, layer_scale=1.0),
    "vit_large": ModelConfig(arch="vit_large", patch_size=14, img_size=518, layer_scale=1.0),
    "vit_giant2": ModelConfig(
        arch="vit_giant2", patch_size=14, img_size=518, layer_scale=1.0, ffn_layer="swiglu"
    ),
}
POLL_SECONDS = 0.02
GB = 1e9


def parse() -> argparse.Namespace:
    """The command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="surgery.py", description=__doc__, formatter_class=raw)
    parser.add_argument("--arch", choices=list(MODELS), default="vit_large")
    parser.add_argument("--folder", type=Path, help="to write into (default: the system's temporary folder)")
    return parser.parse_args()


def write_model(arch: str, path: Path) -> None:
    """Random weights at the scale of trained ones, in fp32."""
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in VisionTransformer(MODELS[arch]).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    state = {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    write_export(path, state, MODELS[arch], {})


def measure(*arguments: object) -> dict[str, Any]:
    """Seconds and peak memory of one verb.

    Raises:
        InputError: the verb failed.
    """
    since, peaks = time.perf_counter(), {"VmHWM": 0, "RssAnon": 0}
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            for line in _status(process.pid):
                name, _, value = line.partition(":")
                if name in peaks:
                    peaks[name] = max(peaks[name], 1024 * int(value.split()[0]))
            time.sleep(POLL_SECONDS)
        message = process.stderr.read() if process.stderr else ""
    if process.returncode not in (0, 1):
        raise InputError(f"{' '.join(command)}: {message}")
    seconds = time.perf_counter() - since
    return {"seconds": seconds, "peak_gb": peaks["VmHWM"] / GB, "own_gb": peaks["RssAnon"] / GB}


def _status(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # it has just ended
        return []


def run_verbs(model: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """Every verb of the table; each writes what a later one reads."""
    changed, pth, model_folder = folder / "changed.safetensors", folder / "b.pth", folder / "hf"
    figures = {
        "inspect": measure("inspect", model),
        "inspect, no spectral norms": measure("inspect", model, "--no-spectral"),
        "convert to dinov2": measure("convert", model, "--to", "dinov2", "--out", pth),
        "convert to huggingface": measure("convert", model, "--to", "huggingface", "--out", model_folder),
        "convert from huggingface": measure("convert", model_folder, "--to", "ours", "--out", changed),
    }
    figures["interpolate to 224"] = measure(
        "interpolate", pth, "--image-size", 224, "--out", changed, "--force"
    )
    figures["diff of equal weights"] = measure("diff", model, pth)
    figures["cast to bfloat16"] = measure("cast", model, "--to", "bfloat16", "--out", changed, "--force")
    figures["diff with the cast"] = measure("diff", model, changed, "--tolerance", 1)
    return figures


def main() -> int:
    """Measure and print."""
    options = parse()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        model = folder / "model.safetensors"
        write_model(options.arch, model)
        size = model.stat().st_size / GB
        figures = run_verbs(model, folder)
    finally:
        shutil.rmtree(folder)
    print(f"{options.arch}, {size:.2f} GB\n\n| verb | s | peak, GB | own, GB |\n|---|--:|--:|--:|")
    for verb, row in figures.items():
        print(f"| {verb} | {row['seconds']:.1f} | {row['peak_gb']:.2f} | {row['own_gb']:.2f} |")
    print(json.dumps({"arch": options.arch, "size_gb": size, "torch": torch.__version__, "verbs": figures}))
    return 0


if __name__ == "__main__":
    sys.exit(exit_status("surgery.py", main))
