import io
import time

import pytest
from rich.console import Console

from pretrain.run.progress import Progress, clock


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock the test sets."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def output(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def plain() -> Console:
    return Console(file=io.StringIO(), width=40)


def test_a_log_file_gets_one_plain_line_an_update(seconds: list[float]) -> None:
    console = plain()
    with Progress(300, 0, console) as progress:
        seconds[0] = 28.0
        progress.update(120, {"loss/total": 7.0312, "lr": 3.1e-3, "images_per_s": 812.4, "koleo": 1.0})
    assert output(console) == "step 120/300  loss 7.031  lr 3.1e-03  812 images/s  eta 0:42\n"


def test_values_are_found_by_the_last_part_of_their_name_and_may_be_absent(seconds: list[float]) -> None:
    console = plain()
    with Progress(10, 0, console) as progress:
        seconds[0] = 1.0
        progress.update(1, {"total": 2.0, "schedule/lr": 1e-4})
        progress.update(10, {})
    assert output(console) == "step 1/10  loss 2.000  lr 1.0e-04  eta 0:09\nstep 10/10  eta 0:00\n"


def test_a_resumed_run_judges_the_time_by_its_own_steps(seconds: list[float]) -> None:
    console = plain()
    with Progress(1000, 900, console) as progress:
        progress.update(900, {})
        seconds[0] = 20.0
        progress.update(910, {})
    assert output(console) == "step 900/1000  eta ?\nstep 910/1000  eta 3:00\n"


def test_the_clock_starts_with_the_context(seconds: list[float]) -> None:
    console = plain()
    progress = Progress(10, 0, console)
    seconds[0] = 1000.0
    with progress:
        seconds[0] = 1001.0
        progress.update(1, {})
    assert output(console) == "step 1/10  eta 0:09\n"


def test_say_prints_the_text_as_it_is() -> None:
    console = plain()
    text = "step 5: [bold]knn[/bold] :smile: " + "long " * 20
    with Progress(10, 0, console) as progress:
        progress.say(text)
    assert output(console) == text + "\n"


def test_a_terminal_gets_a_bar_that_said_lines_do_not_break() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with Progress(300, 100, console) as progress:
        progress.update(120, {"total": 7.0312, "images_per_s": 812.0})
        progress.say("saved [1]")
    text = output(console)
    assert "120/300" in text and "loss 7.031  812 images/s" in text and "40%" in text
    assert "saved [1]\n" in text
    assert "step 120/300  loss" not in text


def test_the_bar_is_taken_down_when_the_run_fails() -> None:
    console = Console(file=io.StringIO(), force_terminal=True)
    with pytest.raises(RuntimeError), Progress(3, 0, console) as progress:
        raise RuntimeError
    assert progress._bar.finished or not progress._bar.live.is_started


@pytest.mark.parametrize(
    ("duration", "text"),
    [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3723, "1:02:03"), (2 * 86400 + 3723, "2d 01:02:03")],
)
def test_clock(duration: float, text: str) -> None:
    assert clock(duration) == text
