import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain.data.retry import JITTER, LONGEST_DELAY, _delay, retry
from pretrain.errors import InputError, TrainingError


def failing(times: int, error: Exception) -> tuple[Callable[[], str], list[int]]:
    calls: list[int] = []

    def action() -> str:
        calls.append(len(calls))
        if len(calls) <= times:
            raise error
        return "done"

    return action, calls


def test_what_works_is_called_once(capfd: pytest.CaptureFixture[str]) -> None:
    action, calls = failing(0, OSError())
    assert (retry(action, "x", 6), len(calls), capfd.readouterr().err) == ("done", 1, "")


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ECONNRESET])
def test_failures_that_pass(code: int, capfd: pytest.CaptureFixture[str]) -> None:
    action, calls = failing(2, OSError(code, "some\nreason"))
    assert retry(action, "/d/x.tar", 6, first_delay=0.01) == "done"
    assert len(calls) == 3
    lines = capfd.readouterr().err.splitlines()
    assert [line.partition("; ")[0] for line in lines] == ["/d/x.tar: some reason"] * 2
    assert lines[1].partition("; ")[2] == "attempt 3 of 6 in 0.0 s"


def test_the_last_failure_ends_the_run_with_one_line() -> None:
    action, calls = failing(9, TimeoutError("no byte for 2 s"))
    with pytest.raises(TrainingError, match=r"^x\.tar: gave up after 3 attempts: no byte for 2 s$"):
        retry(action, "x.tar", 3, first_delay=0.01)
    assert len(calls) == 3


@pytest.mark.parametrize(
    "error",
    [FileNotFoundError("HTTP status 404"), PermissionError("HTTP status 403"), OSError(errno.ENOSPC, "full")],
)
def test_failures_that_stay_are_not_tried_again(error: OSError, capfd: pytest.CaptureFixture[str]) -> None:
    action, calls = failing(9, error)
    with pytest.raises(InputError, match=r"^x\.tar: (HTTP status 40[34]|full)$"):
        retry(action, "x.tar", 6)
    assert (len(calls), capfd.readouterr().err) == (1, "")


def test_a_file_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^shard: No such file or directory$"):
        retry((tmp_path / "x").read_bytes, "shard", 6)


def test_other_errors_pass_through() -> None:
    action, calls = failing(9, InputError("wrong"))
    with pytest.raises(InputError, match=r"^wrong$"):
        retry(action, "x.tar", 6)
    assert len(calls) == 1


def test_delays_grow_up_to_a_limit_and_places_differ() -> None:
    delays = [_delay("x.tar", attempt, 1.0) for attempt in range(1, 9)]
    for delay, base in zip(
        delays, [1, 2, 4, 8, 16, LONGEST_DELAY, LONGEST_DELAY, LONGEST_DELAY], strict=True
    ):
        assert base <= delay <= base * (1 + JITTER)
    assert delays == [_delay("x.tar", attempt, 1.0) for attempt in range(1, 9)]
    assert len({_delay(f"{i}.tar", 1, 1.0) for i in range(20)}) == 20
