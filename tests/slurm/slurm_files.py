"""What a Slurm on one host reads: its configuration, files that stand for GPUs, a line of /etc/hosts."""

import fcntl
import os
import random
import socket
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

HOST = socket.gethostname().partition(".")[0]
LOOPBACK = "127.0.0.1"

SLURM_CONF = """\
ClusterName=virtual
SlurmctldHost={host}({loopback})
SlurmUser=root
SlurmdUser=root
SlurmctldPort={controller_port}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
AuthType=auth/munge
# A requeued job starts again only when its old credential has expired.
AuthInfo=socket={root}/munge/socket,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/state/slurmctld.pid
SlurmdPidFile={root}/spool/%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/%n.log
FirstJobId={first_job_id}
GresTypes=gpu
ProctrackType=proctrack/linuxproc
PropagateResourceLimits=NONE
# Nodes have what is written here, whatever the host has.
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# Seconds.
KillWait=5
MinJobAge=300
SlurmdTimeout=30
SlurmctldTimeout=30
BatchStartTimeout=10
MessageTimeout=10
"""
PARTITIONS = """\
PartitionName=main Nodes={nodes} Default=YES PriorityTier=10 PreemptMode=OFF
PartitionName=low Nodes={nodes} PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=short Nodes={nodes} PriorityTier=10 PreemptMode=OFF DefaultTime=1 MaxTime=2
"""


@dataclass(frozen=True)
class Plan:
    """What a cluster is to be; `ports` are those of the controller and of the nodes, in this order."""

    root: Path
    nodes: list[str]
    ports: list[int]
    cpus: int
    gpus: int
    send_user_signal: bool

    @property
    def conf(self) -> Path:
        return self.root / "etc" / "slurm.conf"

    @property
    def socket(self) -> Path:
        return self.root / "munge" / "socket"


def free_ports(count: int) -> list[int]:
    """Consecutive ports below those that Linux hands out by itself: a restarted daemon finds its own free."""
    while True:
        first = random.SystemRandom().randrange(10_000, 20_000)
        ports = [*range(first, first + count)]
        if all(map(_is_free, ports)):
            return ports


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def listens(port: int) -> bool:
    with suppress(OSError), socket.create_connection((LOOPBACK, port), timeout=1):
        return True
    return False


def write_files(plan: Plan) -> None:
    """Fill the folder of a cluster; everybody may enter it, since jobs of other users talk to munge."""
    plan.root.mkdir(parents=True, exist_ok=True)
    if any(plan.root.iterdir()):
        raise FileExistsError(f"{plan.root} is not empty")
    for name in (".", "etc", "munge", "state", "spool", "log", "dev"):
        (plan.root / name).mkdir(exist_ok=True)
        (plan.root / name).chmod(0o755)
    key = plan.root / "munge" / "key"
    key.touch(0o600)
    key.write_bytes(os.urandom(1024))
    for name, text in (("slurm.conf", slurm_conf(plan)), ("gres.conf", gres_conf(plan))):
        (plan.root / "etc" / name).write_text(text)
    for number in range(plan.gpus):
        os.mknod(plan.root / "dev" / f"gpu{number}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))  # as /dev/null


def slurm_conf(plan: Plan) -> str:
    head = SLURM_CONF.format(
        host=HOST,
        loopback=LOOPBACK,
        controller_port=plan.ports[0],
        root=plan.root,
        first_job_id=random.SystemRandom().randrange(1_000_000, 60_000_000),  # no id twice among clusters
    )
    lines = ["SlurmctldParameters=preempt_send_user_signal"] if plan.send_user_signal else []
    lines += [_node_line(plan, name, port) for name, port in zip(plan.nodes, plan.ports[1:], strict=True)]
    return head + "\n".join([*lines, PARTITIONS.format(nodes=",".join(plan.nodes))])


def _node_line(plan: Plan, name: str, port: int) -> str:
    place = f"NodeHostname={HOST} NodeAddr={LOOPBACK} Port={port}"
    gpus = f" Gres=gpu:{plan.gpus}" if plan.gpus else ""
    return f"NodeName={name} {place} CPUs={plan.cpus} RealMemory=64000{gpus}"


def gres_conf(plan: Plan) -> str:
    """GPUs as files: those that only have a count, Slurm does not find."""
    files = ",".join(f"{plan.root}/dev/gpu{number}" for number in range(plan.gpus))
    line = f"NodeName={','.join(plan.nodes)} Name=gpu File={files}\n" if plan.gpus else ""
    return f"AutoDetect=off\n{line}"


def add_to_hosts(plan: Plan) -> None:
    """Let the names of the nodes and of the host mean the loopback: Slurm binds to what the host's means."""
    names = " ".join(dict.fromkeys(["localhost", socket.gethostname(), HOST, *plan.nodes]))
    _edit_hosts(lambda lines: [f"{LOOPBACK} {names}{_tag(plan)}", *lines])


def remove_from_hosts(plan: Plan) -> None:
    _edit_hosts(lambda lines: [line for line in lines if not line.endswith(_tag(plan))])


def _tag(plan: Plan) -> str:
    return f"  # virtual cluster in {plan.root}\n"


def _edit_hosts(change: Callable[[list[str]], list[str]]) -> None:
    """In place: containers mount the file, so that nothing can be put in its stead."""
    with Path("/etc/hosts").open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        changed = "".join(change(file.readlines()))
        file.seek(0)
        file.write(changed)
        file.truncate()
