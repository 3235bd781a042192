"""Feeds damaged input of every kind to its readers: each case must work or get one clear line.

python -m tests.fuzz --seconds 600 --seed 0              # every kind for an equal share of the time
python -m tests.fuzz --kind shards --seed 0 --case 123   # one case again, with its traceback

A failed case stays in fuzz_failures/KIND-SEED-CASE/ as the files that were read, with fault.json. Exit
status: 0 no failure, 1 at least one.
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.fuzz.campaign import FAILED, Campaign
from tests.fuzz.processes import COLUMNS, in_process
from tests.fuzz.subjects import SUBJECTS

FAILURES = Path("fuzz_failures")


def main() -> int:
    """The command line; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=list(SUBJECTS), action="append")
    parser.add_argument("--case", type=int)
    parser.add_argument("--failures", type=Path, default=FAILURES)
    args = parser.parse_args()
    kinds = args.kind or list(SUBJECTS)
    if args.case is not None:
        return replay(kinds[0], args.seed, args.case, args.failures)
    table = Table("kind", "cases", *COLUMNS, title=f"seed {args.seed}, {args.seconds:g} s")
    failed = 0
    for kind in kinds:
        counts, reasons = in_process(kind, args.seed, args.seconds / len(kinds), args.failures)
        failed += counts[FAILED]
        table.add_row(kind, *(f"{counts[name]:,}" for name in ("cases", *COLUMNS)))
        for reason, example in reasons.items():
            print(f"{args.failures / example}: {reason}", file=sys.stderr)
    Console().print(table)
    return int(failed > 0)


def replay(kind: str, seed: int, number: int, failures: Path) -> int:
    """One case again."""
    result = Campaign(kind, seed, failures).run(number)
    print(f"{kind} {seed} {number}: {result}")
    if result == FAILED:
        print((failures / f"{kind}-{seed}-{number}" / "fault.json").read_text().replace("\\n", "\n"))
    return int(result == FAILED)


if __name__ == "__main__":
    sys.exit(main())
