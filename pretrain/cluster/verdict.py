"""Whether a job that has ended is started again: a function of its history, nothing else."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from pretrain.cluster.history import Attempt
from pretrain.cluster.job_folder import Limits
from pretrain.command_line import STOPPED


@dataclass(frozen=True)
class Verdict:
    """How a job goes on."""

    action: Literal["restart", "end"]
    status: int  # exit status of the job, where it ends
    why: str  # for people
    exclude: list[str] = field(default_factory=list)  # machines that the restart is not to use


def judge(history: Sequence[Attempt], limits: Limits) -> Verdict:
    """The verdict after the last attempt of a history.

    An attempt that saved is continued. One that failed is repeated, but not when the same failure came twice
    without a new checkpoint, or `max_crashes` failures did. A machine that failed its check is left out.
    """
    last = history[-1]
    if last.outcome == "finished":
        return Verdict("end", 0, last.line)
    if last.outcome == "cancelled":
        return Verdict("end", STOPPED, "cancelled")
    if last.number >= limits.max_restarts:
        return Verdict(
            "end", last.status or STOPPED, f"no restart is left of cluster.max_restarts={limits.max_restarts}"
        )
    if last.outcome == "stopped":
        return Verdict("restart", STOPPED, "saved; it goes on from there")
    if last.outcome == "bad node":
        return _without_bad_nodes(history, limits)
    return _after_failure(history, limits)


def excluded(history: Sequence[Attempt]) -> list[str]:
    """All machines that failed a check."""
    return sorted({node for attempt in history for node in attempt.bad_nodes})


def _without_bad_nodes(history: Sequence[Attempt], limits: Limits) -> Verdict:
    nodes, last = excluded(history), history[-1]
    again = {*excluded(history[:-1])} & {*last.bad_nodes}
    if again:
        why = f"{', '.join(sorted(again))} failed the check again, although it was to be left out"
        return Verdict("end", last.status, why)
    if len(nodes) > limits.max_bad_nodes:
        why = f"{', '.join(nodes)} failed the check, more than cluster.max_bad_nodes={limits.max_bad_nodes}"
        return Verdict("end", last.status, why)
    return Verdict("restart", last.status, f"it starts again without {', '.join(nodes)}", nodes)


def _after_failure(history: Sequence[Attempt], limits: Limits) -> Verdict:
    last, row = history[-1], _failures_without_progress(history)
    same = row >= 2 and history[-2].signature == last.signature and last.outcome != "lost"
    if same:
        return Verdict("end", last.status, "the same failure came twice without a new checkpoint between")
    if row >= limits.max_crashes:
        return Verdict("end", last.status, f"{row} failures in a row without a new checkpoint")
    return Verdict("restart", last.status, "it starts again from the newest checkpoint")


def _failures_without_progress(history: Sequence[Attempt]) -> int:
    """How many of the last attempts failed, since the last one that made a checkpoint of its own.

    An attempt that made one and failed later counts as the first of the row: it has met the failure.
    """
    row = 0
    for attempt in reversed(history):
        if not attempt.failed:
            break
        row += 1
        if attempt.step > attempt.step_before:
            break
    return row
