"""A job on this machine: torchrun starts the processes, and again after a failure, as on a cluster."""

import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from types import FrameType

from pretrain.cluster.attempt import begin, end, say
from pretrain.cluster.job_folder import JobFolder
from pretrain.cluster.logs import follow
from pretrain.cluster.script import ATTEMPT
from pretrain.command_line import INTERRUPTED, STOPPED
from pretrain.processes import children, kill_tree, started
from pretrain.records import read_records

LOOPBACK = "lo"  # no other machine takes part, and a name of this one that does not resolve does no harm
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)


class Supervisor:
    """The processes of one job, for the launcher that waits for them."""

    def __init__(self, folder: JobFolder, code: Path, processes: int) -> None:
        self.folder, self.code, self.processes = folder, code, processes
        self.received: int | None = None
        self._agent: subprocess.Popen[bytes] | None = None
        self._attempt = 0

    def run(self) -> int:
        """Train until the job is over; its exit status."""
        pid = os.getpid()
        self.folder.note_start(job_id=str(pid), started=started(pid), host=socket.gethostname())
        before = {number: signal.signal(number, self._forward) for number in SIGNALS}
        try:
            while (status := self._one_attempt()) is None:
                self._attempt += 1
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return status

    def _one_attempt(self) -> int | None:
        """The job's exit status after an attempt; None where another one follows."""
        if self.received is not None:  # between two attempts: all is saved that there is
            return STOPPED
        verdict = begin(self.folder, self._attempt, [socket.gethostname()])
        if verdict is not None:
            say(verdict.why)
            return verdict.status
        self._start_and_wait()
        if self.received == INTERRUPTED:
            return INTERRUPTED
        verdict = end(self.folder, self._attempt)
        if verdict.action == "end":
            return verdict.status
        if self.received is not None:
            say(f"stopped by {signal.Signals(self.received).name}; start again to continue")
            return STOPPED
        return verdict.status if verdict.exclude else None  # there is no other machine

    def _start_and_wait(self) -> None:
        """Run the processes once, showing what rank 0 prints."""
        over = threading.Event()
        reader = threading.Thread(target=self._show, args=(over,))
        with self.folder.batch_log.open("ab") as log:
            self._agent = subprocess.Popen(
                self._command(),
                cwd=self.code,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for this process, which hands it on
            )
            if self.received is not None:  # while it started
                self._agent.terminate()
            reader.start()
            self._agent.wait()
        over.set()
        reader.join()

    def _command(self) -> list[str]:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        return [*torchrun, f"--nproc-per-node={self.processes}", "-m", "pretrain.job", str(self.folder.path)]

    def _environment(self) -> dict[str, str]:
        path = os.pathsep.join(filter(None, [str(self.code), os.environ.get("PYTHONPATH")]))
        own = {"PYTHONPATH": path, ATTEMPT: str(self._attempt)}
        return {"GLOO_SOCKET_IFNAME": LOOPBACK, **os.environ, **own}

    def _show(self, over: threading.Event) -> None:
        log = self.folder.rank_log(self._attempt, 0)
        for text in follow(lambda: log if log.exists() else None, over.is_set, ask_seconds=0.0):
            with suppress(BrokenPipeError):
                sys.stdout.write(text)
                sys.stdout.flush()

    def _forward(self, number: int, frame: FrameType | None) -> None:
        """Let the processes save and end; a second Ctrl-C ends them at once."""
        agent = self._agent
        if self.received is not None and number == signal.SIGINT:
            self.received = INTERRUPTED
            if agent is not None:
                kill_tree(agent.pid)
            return
        self.received = self.received or number
        if agent is None or agent.poll() is not None:
            return
        ready = self._ready()
        for pid in ready:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR2)
        if not ready:  # nothing has started that could save
            agent.terminate()

    def _ready(self) -> list[int]:
        """The processes that listen to signals."""
        records = read_records(self.folder.attempt(self._attempt)).values()
        own = children(self._agent.pid) if self._agent else []
        return [record.pid for record in records if record.status is None and (record.pid in own or not own)]
