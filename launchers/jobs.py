"""Watch, stop and continue the jobs of runs, from any shell and on any day; needs no accounting of Slurm.

python launchers/jobs.py status [RUN_DIR...]      one line a run (default: runs/*)
python launchers/jobs.py logs [-f] RUN_DIR        what rank 0 prints; --rank N, --batch
python launchers/jobs.py cancel [--now] RUN_DIR... save and end
python launchers/jobs.py resume RUN_DIR...        a new job that goes on
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pretrain.cluster import submit
from pretrain.cluster.checks import check_run, check_with_slurm, is_alive
from pretrain.cluster.control import cancel
from pretrain.cluster.cost import duration
from pretrain.cluster.job_folder import JobFolder, job_folders, newest_job
from pretrain.cluster.logs import follow, lines, rank_logs
from pretrain.cluster.status import Status, status
from pretrain.cluster.supervise import Supervisor
from pretrain.command_line import Parser, exit_status
from pretrain.config.load import load_config
from pretrain.errors import InputError
from pretrain.job import Task

PIPED_WIDTH = 180  # of the table where no terminal tells its own


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one of the four commands; the exit status."""
    options = _parse(arguments)
    match options.command:
        case "status":
            return _status(options)
        case "logs":
            return _logs(options)
        case "cancel":
            return max(_each(options.run_dir, lambda run_dir: _cancel(run_dir, options.now)))
        case _:
            return max(_each(options.run_dir, lambda run_dir: _resume(run_dir, options.new_code)))


def _each(run_dirs: Sequence[Path], command: Callable[[Path], int]) -> list[int]:
    """The exit status for each run; one that is refused keeps no other from its turn."""
    return [exit_status("jobs.py", partial(command, run_dir)) for run_dir in run_dirs]


def _cancel(run_dir: Path, now: bool) -> int:
    print(cancel(run_dir, now))
    return 0


def _status(options: argparse.Namespace) -> int:
    given = options.run_dir or [path for path in sorted(Path("runs").glob("*")) if job_folders(path)]
    found: list[Status] = []

    def look(run_dir: Path) -> int:
        found.append(status(run_dir))
        return 0

    worst = max(_each(given, look), default=0)
    if options.json:
        print(json.dumps([asdict(one) for one in found], indent=1))
    elif found:
        console = Console(width=None if sys.stdout.isatty() else PIPED_WIDTH)
        console.print(_table(found))
        for one in found:
            if one.last_error:
                console.print(f"{one.run}: {one.last_error}", highlight=False, markup=False, soft_wrap=True)
    elif not given:
        print("no jobs in runs/; name the folders of runs")
    return worst


def _table(found: Sequence[Status]) -> Table:
    table = Table(
        "run", "job", "state", "restarts", "step", "images/s", "loss", "time left", "nodes", "last error"
    )
    for one in found:
        speed = "" if one.images_per_s is None else f"{one.images_per_s:,.0f}"
        loss = "" if one.loss is None else f"{one.loss:.4f}"
        left = duration(one.seconds_left) if one.seconds_left and one.state == "running" else ""
        step, nodes = f"{one.step:,} of {one.steps:,}", ",".join(one.nodes)
        short = one.last_error[:40]
        job = ", then ".join([one.job_id, *one.followers])
        table.add_row(one.run, job, one.state, str(one.restarts), step, speed, loss, left, nodes, short)
    return table


def _logs(options: argparse.Namespace) -> int:
    folder = newest_job(options.run_dir)
    processes = folder.read().world_size
    if options.rank >= processes:
        raise InputError(f"command line: --rank {options.rank}: the job has ranks 0 to {processes - 1}")

    def newest() -> Path | None:
        if options.batch:
            return folder.batch_log if folder.batch_log.exists() else None
        found = rank_logs(folder, options.rank)
        return found[-1] if found else None

    if options.follow:
        with suppress(KeyboardInterrupt, BrokenPipeError):
            for text in follow(newest, lambda: _is_over(folder), options.lines):
                print(text, end="", flush=True)
        return 0
    path = newest()
    if path is None:
        raise InputError(f"{folder.logs}: no output yet; see `status`, or logs -f to wait for it")
    print(f"==> {path} <==", *lines(path, options.lines), sep="\n")
    return 0


def _is_over(folder: JobFolder) -> bool:
    """Whether the job is over; no, while Slurm does not answer."""
    try:
        return not is_alive(folder.read())
    except InputError:
        return False


def _resume(run_dir: Path, new_code: bool) -> int:
    """A new job with the config and, unless told otherwise, the code of the last one."""
    folder = newest_job(run_dir)
    job = folder.read()
    cfg = load_config(folder.config, options={"cluster": {"dependency": ""}})  # it was met
    check_run(cfg)
    _check_code(job.code, new_code)
    code = None if new_code else Path(job.code)
    if job.kind == "slurm":
        check_with_slurm(cfg, submit.draft(cfg))
        sent = submit.submit(cfg, Task, code)
        print(f"job {sent.job_id} in {sent.folder.path}")
        return 0
    if job.kind == "torchrun":
        new, cfg, code = submit.prepare(cfg, "torchrun", code)
        return Supervisor(new, code, job.world_size).run()
    sent = submit.submit_here(cfg, Task, "local")
    print(f"job {sent.job_id} in {sent.folder.path}")
    return 0


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return int(text)


def _check_code(code: str, new_code: bool) -> None:
    if not new_code and not Path(code).is_dir():
        raise InputError(f"{code}: the code of the last job is gone; add --new-code")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="status|logs|cancel|resume")
    state = commands.add_parser("status", help="one line a run")
    state.add_argument("run_dir", nargs="*", type=Path, metavar="RUN_DIR")
    state.add_argument("--json", action="store_true", help="for programs")
    logs = commands.add_parser("logs", help="the output of a rank")
    logs.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    logs.add_argument("-f", "--follow", action="store_true", help="until the job is over, across restarts")
    logs.add_argument("--rank", type=_count, default=0, help="default: 0")
    logs.add_argument("--batch", action="store_true", help="the batch script's log: starts, ends, decisions")
    logs.add_argument("--lines", type=_count, default=40, help="to begin with (default: 40)")
    stop = commands.add_parser("cancel", help="save and end")
    stop.add_argument("run_dir", nargs="+", type=Path, metavar="RUN_DIR")
    stop.add_argument("--now", action="store_true", help="without a save")
    again = commands.add_parser("resume", help="a new job that goes on")
    again.add_argument("run_dir", nargs="+", type=Path, metavar="RUN_DIR")
    again.add_argument(
        "--new-code", action="store_true", help="with the code as it is now, not the last job's"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(exit_status("jobs.py", main))
