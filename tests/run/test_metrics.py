import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pretrain.errors import InputError
from pretrain.run.metrics import Averages, MetricLog, Throughput


def lines(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def session(folder: Path, steps_done: int, steps: list[int], tensorboard: bool = False) -> None:
    log = MetricLog(folder, tensorboard, steps_done)
    for step in steps:
        log.write(step, {"loss/total": steps_done + step / 1000})
    log.close()


def test_each_write_is_a_line_that_stands_at_once(tmp_path: Path) -> None:
    log = MetricLog(tmp_path / "run", False, 0)
    log.write(10, {"loss/total": 7.25, "lr": 1e-7})
    assert lines(tmp_path / "run") == [{"step": 10, "loss/total": 7.25, "lr": 1e-7}]
    log.write(20, {"loss/total": 1 / 3})
    assert lines(tmp_path / "run")[1] == {"step": 20, "loss/total": 1 / 3}
    log.close()
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_values_that_are_not_finite_keep_the_line_valid(tmp_path: Path) -> None:
    log = MetricLog(tmp_path, False, 0)
    log.write(1, {"a": math.nan, "b": 2.0, "c": -math.inf})
    log.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    strict = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert strict == {"step": 1, "a": None, "b": 2.0, "c": None, "nonfinite": ["a", "c"]}


def test_a_resumed_run_drops_the_steps_it_runs_again(tmp_path: Path) -> None:
    session(tmp_path, 0, [0, 10, 20, 30, 40])
    session(tmp_path, 20, [30, 40, 50])
    assert [line["step"] for line in lines(tmp_path)] == [0, 10, 20, 30, 40, 50]
    assert lines(tmp_path)[3]["loss/total"] == 20.03  # from the second session


def test_a_run_that_starts_again_drops_everything(tmp_path: Path) -> None:
    session(tmp_path, 0, [0, 10])
    session(tmp_path, 0, [0, 10])
    assert [line["step"] for line in lines(tmp_path)] == [0, 10]


@pytest.mark.parametrize("torn", ['{"step": 20, "lo', '{"step": 20}', "\0\0\0\0\n", "\xff\n", "17\n", "{}\n"])
def test_a_line_torn_by_a_crash_is_dropped(tmp_path: Path, torn: str) -> None:
    session(tmp_path, 0, [10])
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(torn.encode("latin-1"))
    session(tmp_path, 20, [30])
    assert [line["step"] for line in lines(tmp_path)] == [10, 30]
    assert list(tmp_path.iterdir()) == [tmp_path / "metrics.jsonl"]


def test_tensorboard_has_each_point_once_after_a_resume(tmp_path: Path) -> None:
    session(tmp_path, 0, [10, 20, 30, 40], tensorboard=True)
    # TensorBoard reads event files in the order of the seconds in their names: age the first session's
    first = next((tmp_path / "tensorboard").iterdir())
    parts = first.name.split(".")
    first.rename(first.with_name(".".join([*parts[:3], str(int(parts[3]) - 10), *parts[4:]])))
    session(tmp_path, 20, [30, 40, 50], tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss/total")
    assert [event.step for event in events] == [10, 20, 30, 40, 50]
    assert [round(event.value, 3) for event in events] == [0.01, 0.02, 20.03, 20.04, 20.05]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot be written .*; set run\.dir"):
        MetricLog(tmp_path / "file" / "run", False, 0)


def test_a_full_disk_is_one_line_that_names_the_folder(tmp_path: Path) -> None:
    """In a process of its own, whose files may have ten bytes."""
    script = """if True:
        import resource, signal, sys
        from pathlib import Path
        from pretrain.command_line import exit_status
        from pretrain.run.metrics import MetricLog

        def write():
            try:
                log.write(1, {"loss/total": 1.0})
            finally:
                log.close()

        log = MetricLog(Path(sys.argv[1]), False, 0)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
        sys.exit(exit_status("pretrain", write))"""
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True)
    assert done.returncode == 2
    line = f"pretrain: {tmp_path}: metrics cannot be written (File too large); make room, then start again\n"
    assert done.stderr == line


def test_averages_are_means_since_the_last_reading() -> None:
    averages = Averages()
    assert averages.means() == {}
    for value in (1.0, 2.0, 6.0):
        averages.add(
            {"loss": torch.tensor(value, requires_grad=True), "norm": torch.tensor([value]).bfloat16()}
        )
    averages.add({"rare": torch.tensor(5)})
    assert averages.means() == {"loss": 3.0, "norm": 3.0, "rare": 5.0}
    averages.add({"loss": torch.tensor(4.0)})
    assert averages.means() == {"loss": 4.0}


def test_averages_do_not_follow_a_tensor_that_is_written_again() -> None:
    averages, value = Averages(), torch.tensor(1.0)
    averages.add({"loss": value})
    value.fill_(100.0)
    assert averages.means() == {"loss": 1.0}


def test_adding_keeps_no_graph_and_reads_nothing() -> None:
    """The meta device has no values: any copy to the host would raise, as it does in `means`."""
    averages = Averages()
    for _ in range(2):
        averages.add({"loss": torch.ones((), device="meta", requires_grad=True) * 2})
    assert not averages._sums["loss"].requires_grad
    with pytest.raises((NotImplementedError, RuntimeError)):
        averages.means()


def test_throughput_counts_one_window(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    throughput = Throughput()
    throughput.add(64)
    throughput.add(64)
    now = 102.0
    assert throughput.rate() == 64.0
    throughput.add(30)
    now = 103.0
    assert throughput.rate() == 30.0


@pytest.mark.skipif(os.name != "posix", reason="uses a POSIX kill")
def test_a_killed_process_loses_no_written_line(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        log = MetricLog(tmp_path, False, 0)
        log.write(10, {"loss": 1.0})
        os._exit(9)  # no buffers are flushed, as in a kill
    os.waitpid(child, 0)
    assert lines(tmp_path) == [{"step": 10, "loss": 1.0}]
