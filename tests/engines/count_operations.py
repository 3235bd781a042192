"""What one training step of small runs asks of the device, against `operations.json`.

python -m tests.engines.count_operations             # the counts, and what differs from the file
python -m tests.engines.count_operations --write     # write the file anew
"""

import argparse
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from pretrain.config.schema import Config, HeadConfig, LossConfig, RmlpConfig
from pretrain.data.synthetic import noise_batch
from pretrain.dry_run import Trainer
from pretrain.run.metrics import Averages
from pretrain.run.profiling import PhaseTimer
from pretrain.train import train_step
from tests.engines.operation_counter import OperationCounter, PhaseCounts
from tests.small import small_config

FILE = Path(__file__).with_name("operations.json")
COMMAND = "python -m tests.engines.count_operations --write"
SLACK = 0.02  # of a phase's operations, and 2 at least: what another version of torch may take more
IMAGES = 8  # a global batch, in groups of 4

Stored = dict[str, Any]


def config(heads: str, centering: str, micro_batches: int, precision: str) -> Config:
    """Two blocks with drop path, at the step after the first."""
    cfg = small_config(
        dino_head=HeadConfig(heads, prototypes=40, hidden_dim=32, bottleneck_dim=16),
        rmlp=RmlpConfig(outputs=64),
        loss=LossConfig(centering=centering),
    )
    return replace(
        cfg,
        # math: the counter of products does not see into a CPU's fused kernel, whose name varies
        model=replace(cfg.model, attention="math", drop_path_rate=0.4),
        engine=replace(cfg.engine, precision=precision, accumulation_steps=micro_batches),
    )


CASES = {
    f"{heads} {centering} {micro_batches}x{IMAGES // micro_batches} {precision}": config(
        heads, centering, micro_batches, precision
    )
    for heads, centering, micro_batches in (
        ("mlp", "sinkhorn", 1),
        ("mlp", "sinkhorn", 2),
        ("rmlp", "softmax", 2),
    )
    for precision in ("fp32", "bf16")
}


def count(cfg: Config) -> dict[str, PhaseCounts]:
    """Of the second step of a run, by phase; the first allocates what later ones keep."""
    parts = cfg.engine.accumulation_steps
    size, device = IMAGES // parts, torch.device("cpu")
    trainer = Trainer(cfg, device, size)
    run: Any = SimpleNamespace(cfg=cfg, engine=trainer.engine, method=trainer.method)
    batches = [noise_batch(cfg, size, i * size) for i in range(parts)]
    train_step(run, 0, trainer.schedules.at(0), batches, PhaseTimer(device))
    counter, averages = OperationCounter(), Averages()
    timer: Any = counter
    with counter.counting():
        result, observation = train_step(run, 1, trainer.schedules.at(1), batches, timer)
        with counter.phase("log"):  # of every step, as `Report.add`
            for losses in observation.losses:
                averages.add(losses, result.good)
            averages.add(result.grad_norms, result.good)
    return dict(counter.phases)


def differences(found: dict[str, PhaseCounts], stored: Stored) -> tuple[list[str], list[str]]:
    """What is worse or not as stored, and what has only become less; a line each."""
    worse, less = [], []
    for phase in sorted({*found, *stored}):
        mine, old = found.get(phase, PhaseCounts()), _stored(stored.get(phase, {}))
        if mine.flops != old.flops:
            worse.append(
                f"{phase}: {mine.flops:,} FLOPs in products, {old.flops:,} stored ({_products(mine, old)})"
            )
        if mine.waits != old.waits:
            worse.append(f"{phase}: the host would wait for a GPU {_changed(mine.waits, old.waits)}")
        number, before = mine.operations.total(), old.operations.total()
        line = f"{phase}: {number} operations, {before} stored ({_changed(mine.operations, old.operations)})"
        if number > before + max(2, SLACK * before):
            worse.append(line)
        elif number < before:
            less.append(line)
    return worse, less


def _stored(phase: dict[str, Any]) -> PhaseCounts:
    waits, operations = Counter(phase.get("waits", {})), Counter(phase.get("operations", {}))
    return PhaseCounts(phase.get("flops", 0), waits, operations)


def _changed(mine: Counter[str], old: Counter[str]) -> str:
    """Largest changes first: `+8 copy_, -2 mul`."""
    change = {name: mine[name] - old[name] for name in {*mine, *old} if mine[name] != old[name]}
    return ", ".join(f"{change[name]:+} {name}" for name in sorted(change, key=lambda n: (-change[n], n)))


def _products(mine: PhaseCounts, old: PhaseCounts) -> str:
    """The operations that count as products, where their number changed."""
    names = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward")
    kept = [Counter({name: counts.operations[name] for name in names}) for counts in (mine, old)]
    return _changed(*kept) or "as many products, of other sizes"


def read() -> dict[str, Stored]:
    """The stored counts by case and phase."""
    stored: dict[str, Stored] = {}
    for name, phase in json.loads(FILE.read_text()).items():
        case, _, phase_name = name.partition(": ")
        stored.setdefault(case, {})[phase_name] = phase
    return stored


def write(found: dict[str, dict[str, PhaseCounts]]) -> None:
    """Store counts, a line per phase: the difference of two versions shows where a change is."""
    lines = [
        f"{json.dumps(f'{case}: {phase}')}: {json.dumps(vars(counts), sort_keys=True)}"
        for case, phases in found.items()
        for phase, counts in phases.items()
    ]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main() -> int:
    """Print the counts and their differences; with `--write`, store them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write {FILE.name} anew")
    options = parser.parse_args()
    found = {name: count(cfg) for name, cfg in CASES.items()}
    stored = read() if FILE.exists() else {}
    for name, phases in found.items():
        print(name)
        for phase, counts in phases.items():
            waits = f", waits {dict(counts.waits)}" if counts.waits else ""
            print(f"  {phase:9} {counts.operations.total():5} operations {counts.flops:12,} FLOPs{waits}")
        worse, less = differences(phases, stored.get(name, {}))
        print("".join(f"  ! {line}\n" for line in [*worse, *less]), end="")
    if options.write:
        write(found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
