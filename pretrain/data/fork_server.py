"""The process that starts those of the loader: it does not hear the signals of a job.

A batch system's warning may come while the fork server is still loading. It would end by it, the start of the
first worker would fail, and a job that has to save and stop would count as crashed.
"""

import signal
from multiprocessing import forkserver, resource_tracker

# of a whole job; the training process alone answers them
JOB_SIGNALS = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2})


def start_fork_server() -> None:
    """Start it, unless it runs, with these signals blocked; so they are in the processes that it starts."""
    resource_tracker.ensure_running()  # the fork server starts it too, and its start unblocks signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, JOB_SIGNALS)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
