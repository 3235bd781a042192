from dataclasses import replace

import pytest

from pretrain.cluster.history import Attempt
from pretrain.cluster.verdict import judge
from tests.cluster.jobs import LIMITS, attempt


def crash(number: int, signature: str = "a", **facts: object) -> Attempt:
    return attempt(number, "crashed", status=1, signature=signature, **facts)


def test_a_finished_and_a_cancelled_job_end() -> None:
    assert (
        judge([attempt(0, "finished")], LIMITS).action,
        judge([attempt(0, "finished")], LIMITS).status,
    ) == (
        "end",
        0,
    )
    assert (
        judge([attempt(0, "cancelled")], LIMITS).action,
        judge([attempt(0, "cancelled")], LIMITS).status,
    ) == (
        "end",
        75,
    )


@pytest.mark.parametrize("outcome", ["stopped", "crashed", "killed", "lost"])
def test_what_may_be_cured_is_tried_again(outcome: str) -> None:
    verdict = judge([attempt(0, outcome, status=1)], LIMITS)
    assert (verdict.action, verdict.exclude) == ("restart", [])


def test_the_same_failure_twice_without_progress_ends_the_job() -> None:
    assert judge([crash(0), crash(1)], LIMITS).action == "end"
    assert judge([crash(0, step=5), crash(1, step_before=5, step=5)], LIMITS).action == "end"
    assert judge([crash(0), crash(1, step=5)], LIMITS).action == "restart"
    assert judge([crash(0), crash(1, "b")], LIMITS).action == "restart"
    assert judge([crash(0), attempt(1, "stopped"), crash(2)], LIMITS).action == "restart"


def test_other_failures_in_a_row_end_the_job_too() -> None:
    history = [crash(0, "a"), crash(1, "b"), crash(2, "c")]
    verdict = judge(history, LIMITS)
    assert (verdict.action, verdict.why) == ("end", "3 failures in a row without a new checkpoint")
    assert judge(history[:2], LIMITS).action == "restart"


def test_lost_machines_are_no_failure_of_the_code() -> None:
    lost = [attempt(n, "lost", status=1, signature="") for n in range(3)]
    assert judge(lost[:2], LIMITS).action == "restart"
    assert judge(lost, LIMITS).action == "end"


def test_bad_machines_are_left_out_up_to_a_number() -> None:
    first = attempt(0, "bad node", status=3, bad_nodes=["gpu2"])
    assert judge([first], LIMITS).exclude == ["gpu2"]
    second = attempt(1, "bad node", status=3, bad_nodes=["gpu1"])
    verdict = judge([first, second], LIMITS)
    assert (verdict.action, verdict.status) == ("end", 3)
    assert verdict.why == "gpu1, gpu2 failed the check, more than cluster.max_bad_nodes=1"
    assert judge([first, second], replace(LIMITS, max_bad_nodes=2)).exclude == ["gpu1", "gpu2"]


def test_restarts_are_bounded_whatever_the_reason() -> None:
    verdict = judge([attempt(10, "stopped", step=9, status=75)], LIMITS)
    assert (verdict.action, verdict.why) == ("end", "no restart is left of cluster.max_restarts=10")
    assert judge([attempt(9, "stopped", step=9, status=75)], LIMITS).action == "restart"


def test_a_bad_machine_that_comes_back_ends_the_job() -> None:
    history = [attempt(n, "bad node", status=3, bad_nodes=["gpu2"]) for n in range(2)]
    assert judge(history, LIMITS).why == "gpu2 failed the check again, although it was to be left out"
