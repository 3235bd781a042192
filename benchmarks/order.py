"""The sample order alone: what it costs for a billion samples, and how well it shuffles.

    python benchmarks/order.py

No shard is read and no torch imported. The cost is measured in a process of its own. The quality stands
beside a full shuffle of the same data: shards that a batch draws from (weighted, 1 / sum of squared shares),
pairs of samples that were stored side by side and meet in a batch, and pairs that share a batch in two
epochs. The last line of the output is one JSON object.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import time
from collections import Counter
from itertools import combinations
from statistics import mean, median
from typing import Any

from arguments import at_least

from pretrain.command_line import Parser, exit_status
from pretrain.data.order import Order, Shuffle

QUALITY_SHARDS, QUALITY_SIZE, BATCH = 400, 250, 1_024  # 100,000 samples
BATCHES = 40  # looked at in each epoch


def parse() -> argparse.Namespace:
    """The command line."""
    parser = Parser(
        prog="order.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--samples", type=at_least(1), default=1_000_000_000, help="default 1,000,000,000")
    parser.add_argument("--shards", type=at_least(1), default=10_000, help="default 10,000")
    parser.add_argument(
        "--lookups", type=at_least(1), default=10_000, help="positions looked up (default 10,000)"
    )
    parser.add_argument("--cost-of", choices=["block", "full", "none"], help=argparse.SUPPRESS)
    return parser.parse_args()


def cost(shuffle: Shuffle, samples: int, shards: int, lookups: int) -> dict[str, Any]:
    """Start-up, memory and time of a position, in this process."""
    sizes = [samples // shards + (i < samples % shards) for i in range(shards)]
    since = time.perf_counter()
    order = Order(sizes, seed=0, shuffle=shuffle, open_shards=16)
    order.at(0)
    start_up = time.perf_counter() - since
    rng, times = random.Random(0), []
    for _ in range(lookups):
        position = rng.randrange(samples)
        since = time.perf_counter()
        order.at(position)
        times.append(time.perf_counter() - since)
    since = time.perf_counter()
    order.at(50 * samples + 12_345)  # fifty epochs on
    later = time.perf_counter() - since
    return {
        "shuffle": shuffle,
        "start_up_s": start_up,
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "position_median_us": 1e6 * median(times),
        "position_99_of_100_us": 1e6 * sorted(times)[lookups * 99 // 100],
        "position_slowest_us": 1e6 * max(times),
        "position_in_epoch_50_ms": 1e3 * later,
        "torch_imported": "torch" in sys.modules,
    }


def quality(shuffle: Shuffle, open_shards: int) -> dict[str, Any]:
    """How mixed the batches of two epochs are."""
    order = Order([QUALITY_SIZE] * QUALITY_SHARDS, seed=0, shuffle=shuffle, open_shards=open_shards)
    epochs = [_batches(order, epoch) for epoch in (0, 1)]
    first = epochs[0][:BATCHES]
    return {
        "shuffle": shuffle if shuffle != "block" else f"block, {open_shards} open",
        "shards_in_a_batch": mean(_effective([shard for shard, _ in batch]) for batch in first),
        "stored_neighbours_in_a_batch": mean(_neighbours(batch) for batch in first),
        "pairs_kept_percent": 100 * _kept(*epochs),
    }


def _batches(order: Order, epoch: int) -> list[list[tuple[int, int]]]:
    """(shard, index) of the samples of each whole batch of an epoch."""
    start = epoch * len(order)
    samples = [order.at(start + i) for i in range(len(order))]
    places = [(sample.shard, sample.index) for sample in samples]
    return [places[i : i + BATCH] for i in range(0, len(places) - BATCH + 1, BATCH)]


def _effective(shards: list[int]) -> float:
    """The number of shards, each weighted by its share."""
    return len(shards) ** 2 / sum(count**2 for count in Counter(shards).values())


def _neighbours(batch: list[tuple[int, int]]) -> int:
    stored = set(batch)
    return sum((shard, index + 1) in stored for shard, index in batch)


def _kept(first: list[list[tuple[int, int]]], second: list[list[tuple[int, int]]]) -> float:
    """Of pairs that share a batch in one epoch, the share that do so in the next."""
    home = {place: number for number, batch in enumerate(second) for place in batch}
    rng, kept, count = random.Random(0), 0, 0
    for batch in first[:BATCHES]:
        for a, b in combinations(rng.sample(batch, 60), 2):
            if a in home and b in home:
                kept += home[a] == home[b]
                count += 1
    return kept / count


def table(rows: list[dict[str, Any]]) -> str:
    """Rows of equal keys as a Markdown table."""
    head = list(rows[0])
    lines = [head, ["---"] * len(head), *([_cell(row[key]) for key in head] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> int:
    """Measure, print the tables and the JSON line."""
    options = parse()
    if options.cost_of:
        print(json.dumps(cost(options.cost_of, options.samples, options.shards, options.lookups)))
        return 0
    costs = []
    for shuffle in ("block", "full", "none"):
        command = [sys.executable, __file__, "--cost-of", shuffle]
        for name in ("samples", "shards", "lookups"):
            command += [f"--{name}", str(getattr(options, name))]
        costs.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    print(f"{options.samples:,} samples in {options.shards:,} shards\n\n{table(costs)}\n")
    qualities = [quality("block", k) for k in (1, 4, 16, 64)] + [quality("full", 1)]
    print(f"{QUALITY_SHARDS} shards of {QUALITY_SIZE} samples, batches of {BATCH}\n\n{table(qualities)}\n")
    print(
        json.dumps(
            {"samples": options.samples, "shards": options.shards, "cost": costs, "quality": qualities}
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(exit_status("order.py", main))
