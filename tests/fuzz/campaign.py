"""Runs cases; each is a function of kind, seed and number, so that a failure can be replayed."""

import json
import os
import shutil
import traceback
from collections import Counter
from functools import cache
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

from tests.fuzz.cases import Files, outcome, write_case
from tests.fuzz.guard import Guard
from tests.fuzz.subjects import SUBJECTS, mutate

FAILED = "failed"
SECONDS = 30  # for a case
guard = cache(Guard)


class Campaign:
    """Cases of one kind in a folder of its own; a failed case stays in `failures`, with what replays it."""

    def __init__(self, kind: str, seed: int, failures: Path) -> None:
        self.kind, self.seed, self.subject = kind, seed, SUBJECTS[kind]
        self.failures = failures
        self.counts: Counter[str] = Counter()
        self.reasons: dict[str, str] = {}  # of failures, one example of each
        with TemporaryDirectory() as folder:
            self.examples = self.subject.examples(Path(folder))

    def files(self, number: int) -> Files:
        """The files of a case."""
        random = Random(f"{self.kind} {self.seed} {number}")
        return mutate(random, random.choice(self.examples))

    def run(self, number: int) -> str:
        """One case; what became of it."""
        files = self.files(number)
        kept = self.failures / f"{self.kind}-{self.seed}-{number}"
        write_case(kept, files)  # before it runs: a case that ends the process leaves itself behind
        with TemporaryDirectory() as folder:
            case = Path(os.path.realpath(folder)) / "case"
            write_case(case, files)
            result, fault = self._outcome(case)
        self.counts[result] += 1
        if fault:
            self.reasons.setdefault(fault.strip().splitlines()[-1][:150], kept.name)
            about = {"kind": self.kind, "seed": self.seed, "case": number, "fault": fault}
            (kept / "fault.json").write_text(json.dumps(about, indent=1) + "\n")
        else:
            shutil.rmtree(kept)
        return result

    def _outcome(self, case: Path) -> tuple[str, str]:
        """What became of it, and the fault where it failed."""
        try:
            with guard().watch(case, SECONDS) as breaches:
                result = outcome(self.subject, case)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:
            return FAILED, traceback.format_exc()
        return (FAILED, "\n".join(breaches)) if breaches else (result, "")
