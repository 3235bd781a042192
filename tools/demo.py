"""From images to a trained backbone on a CPU in a few minutes: `make demo`.

Packs scikit-learn's handwritten digits into shards, pretrains a tiny ViT with MLP heads, continues it with
randomized heads, and prints the k-NN accuracy on held-out images after each stage. Everything lands in
`runs/`; a stage that is finished is not run again.
"""

import json
import subprocess
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pretrain.analysis.knn import knn_accuracy
from pretrain.command_line import exit_status
from pretrain.config.load import load_config
from pretrain.config.schema import KnnConfig
from pretrain.data.digits import write_digits
from pretrain.data.labelled import labelled_batches

DATA = Path("runs/demo_data")
PHASES = ("configs/demo.yaml", "configs/demo_rmlp.yaml")
MIN_GAIN = 20  # points of k-NN accuracy that pretraining must bring
MAX_CHANGE = 3  # points by which the second phase may change it

Scores = dict[int, dict[str, float]]  # by step: the line that a run logged


def main() -> int:
    """Run every stage and print the table; the exit status of the first stage that fails."""
    console = Console()
    if not (DATA / "test-000000.tar").exists():
        console.print(f"packing scikit-learn's digits into {DATA}")
        write_digits(DATA)
    for config in PHASES:
        console.print(f"$ python -m pretrain {config}", highlight=False)
        status = subprocess.call([sys.executable, "-m", "pretrain", config])
        if status:
            return status
    first, second = (scores(Path(load_config(config).run.dir)) for config in PHASES)
    console.print(results(first, second))
    console.print(places(), highlight=False, soft_wrap=True)
    return verdict(first, second, console)


def verdict(first: Scores, second: Scores, console: Console) -> int:
    """Whether the installation learns as it should; 0 or 1."""
    trained = first[last_step(first)]["knn/cls"]
    gain = trained - max(first[0]["knn/cls"], first[0]["knn/patch_mean"])
    change = second[last_step(second)]["knn/cls"] - trained
    learns = gain >= MIN_GAIN and abs(change) <= MAX_CHANGE
    text = f"CLS gained {gain:.1f} points over the best of random weights, then changed by {change:+.1f}"
    wanted = f"at least {MIN_GAIN} and at most {MAX_CHANGE} either way"
    console.print(f"{text}: {'as' if learns else 'NOT as'} it should be ({wanted})", highlight=False)
    return 0 if learns else 1


def results(first: Scores, second: Scores) -> Table:
    """k-NN accuracy of every stage."""
    table = Table("k-NN accuracy on 397 held-out images, %", "CLS", "mean patch token")
    table.add_row("raw pixels", f"{pixels(load_config(PHASES[0]).log.knn):.1f}", "")
    stages = [
        ("random weights", first[0]),
        (f"after {last_step(first)} steps with MLP heads", first[last_step(first)]),
        (f"after {last_step(second)} more with randomized heads", second[last_step(second)]),
    ]
    for name, score in stages:
        table.add_row(name, f"{score['knn/cls']:.1f}", f"{score['knn/patch_mean']:.1f}")
    return table


def scores(run: Path) -> Scores:
    """The k-NN scores that a run has logged, by step."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line for line in lines if "knn/cls" in line}


def last_step(by_step: Scores) -> int:
    """The last step with scores."""
    return max(by_step)


def pixels(knn: KnnConfig) -> float:
    """k-NN accuracy of the pixels themselves."""

    def read(split: str, patterns: list[str]) -> tuple[Tensor, Tensor]:
        batches = labelled_batches(
            patterns, split, knn.resize, knn.crop, [0.5] * 3, [0.5] * 3, knn.batch_size
        )
        images, labels = zip(*batches, strict=True)
        return torch.cat(images).flatten(1), torch.cat(labels)

    train, test = read("log.knn.train", knn.train), read("log.knn.test", knn.test)
    return knn_accuracy(*train, *test, knn.k, knn.temperature)


def places() -> str:
    """Where to look next."""
    runs = [Path(load_config(config).run.dir) for config in PHASES]
    exports = [str(max((run / "exports").glob("*.safetensors"))) for run in runs]
    return (
        "curves:             .venv/bin/tensorboard --logdir runs\n"
        f"checkpoints:        {', '.join(str(run / 'checkpoints' / 'latest') for run in runs)}\n"
        f"exported teachers:  {', '.join(exports)}\n"
        "start over:         rm -r runs/demo runs/demo_rmlp"
    )


if __name__ == "__main__":
    sys.exit(exit_status("demo.py", main))
