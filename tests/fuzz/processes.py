"""Fuzzing in a process of its own: a parser that crashes is one failed case, and the rest goes on."""

import resource
import time
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

from tests.fuzz.campaign import FAILED, SECONDS, Campaign
from tests.fuzz.cases import CORRUPT, REFUSED, WORKED

MEMORY = 24 << 30  # address space of a process: what takes more has believed a header
COLUMNS = (WORKED, REFUSED, CORRUPT, FAILED)
SILENCE = 3 * SECONDS  # without a result: it hangs where no signal of its own reaches it, as in a C parser


def in_process(kind: str, seed: int, seconds: float, failures: Path) -> tuple[dict[str, int], dict[str, str]]:
    """Cases for some seconds in a process of their own: a crash of a parser is one failed case."""
    counts: dict[str, int] = dict.fromkeys(("cases", *COLUMNS), 0)
    reasons: dict[str, str] = {}
    end, number = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        receiver, sender = get_context("spawn").Pipe(duplex=False)
        process = get_context("spawn").Process(target=_work, args=(kind, seed, number, end, failures, sender))
        process.start()
        sender.close()
        while receiver.poll(SILENCE):
            try:
                number, result, found = receiver.recv()
            except EOFError:
                break
            counts["cases"] += 1
            counts[result] += 1
            reasons = found | reasons
            number += 1
        else:
            process.kill()
        process.join()
        if process.exitcode:
            counts["cases"] += 1
            counts[FAILED] += 1
            reasons[f"the process ended with {process.exitcode}"] = f"{kind}-{seed}-{number}"
            number += 1
    return counts, reasons


def _work(kind: str, seed: int, first: int, end: float, failures: Path, sender: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    campaign = Campaign(kind, seed, failures)
    number = first
    while time.monotonic() < end:
        sender.send((number, campaign.run(number), campaign.reasons))
        number += 1
