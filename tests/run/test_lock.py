"""The run folder's lock: real processes, kills, and rivals."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pretrain.errors import InputError
from pretrain.run import lock
from pretrain.run.lock import RunLock

HOLD = "import sys, time; from pathlib import Path; from pretrain.run.lock import RunLock\n"
HOLD += "with RunLock(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"


def holder(folder: Path) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def end(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_process_is_refused_and_a_dead_one_is_not(tmp_path):
    process = holder(tmp_path)
    with pytest.raises(InputError, match=f"process {process.pid} on .* is training in this folder"):
        RunLock(tmp_path).__enter__()
    assert process.poll() is None
    end(process)  # kill -9: the file stays
    assert (tmp_path / "run.lock").exists()
    with RunLock(tmp_path):
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()
    assert not tmp_path.exists()  # nothing was left in it


def test_a_process_number_used_again_is_not_the_owner(tmp_path):
    mine = RunLock(tmp_path).owner
    (tmp_path / "run.lock").write_text(json.dumps(mine | {"started": "1"}))
    with RunLock(tmp_path):
        pass


def test_a_lock_of_another_machine_counts_while_it_is_touched(tmp_path):
    path = tmp_path / "run.lock"
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": "1"}))
    over = threading.Event()

    def touch() -> None:
        while not over.wait(0.05):
            os.utime(path)

    thread = threading.Thread(target=touch)
    thread.start()
    with pytest.raises(InputError, match="process 1 on elsewhere"):
        RunLock(tmp_path, stale_seconds=5).__enter__()
    over.set()
    thread.join()
    with RunLock(tmp_path, stale_seconds=0.3):
        pass


def test_another_process_table_is_another_machine(tmp_path):
    """Containers of one machine may share its name: a process of theirs must not be looked up here."""
    with RunLock(tmp_path):
        host = json.loads((tmp_path / "run.lock").read_text())["host"]
    assert host.split() == [socket.gethostname(), str(Path("/proc/self/ns/pid").readlink())]


def test_a_rival_that_has_just_come_is_named(tmp_path):
    path, owner = tmp_path / "run.lock", {"host": "elsewhere pid:[1]", "pid": 1, "started": "1"}
    path.touch()  # made, and not written yet
    writer = threading.Timer(0.1, lambda: path.write_text(json.dumps(owner)))
    writer.start()
    with pytest.raises(InputError, match="process 1 on elsewhere is training"):
        RunLock(tmp_path, stale_seconds=5).__enter__()
    writer.join()


def test_a_damaged_lock_is_taken_over(tmp_path):
    (tmp_path / "run.lock").write_text("{")
    with RunLock(tmp_path, stale_seconds=0.3):
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()


def test_the_owner_touches_its_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.05)
    with RunLock(tmp_path):
        first = (tmp_path / "run.lock").stat().st_mtime_ns
        deadline = time.monotonic() + 5
        while (tmp_path / "run.lock").stat().st_mtime_ns == first:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_one_of_many_rivals_for_a_dead_lock_gets_it(tmp_path):
    end(holder(tmp_path))
    script = "import sys, time; from pathlib import Path; from pretrain.run.lock import RunLock\n"
    script += "from pretrain.errors import InputError\n"
    script += "try:\n with RunLock(Path(sys.argv[1])): print('held'); time.sleep(4)\n"
    script += "except InputError: print('refused')"
    rivals = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(5)
    ]
    answers = sorted(rival.communicate()[0].strip() for rival in rivals)
    assert answers == ["held", *["refused"] * 4]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot be used as a run folder .*; set run.dir"):
        RunLock(tmp_path / "file" / "run").__enter__()
