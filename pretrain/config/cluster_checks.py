"""What section `cluster` may hold: each text becomes an option of sbatch, in a line of its own. No torch."""

import re

from pretrain.config.schema import ClusterConfig

WORDS = (  # one word each; Slurm knows no blanks in them, and a script no line breaks
    *("partition", "account", "qos", "constraint", "exclude", "dependency", "mail"),
)
TIME = re.compile(r"\d+|\d+:\d\d|\d+:\d\d:\d\d|\d+-\d+(:\d\d){0,2}")  # as sbatch reads it


def cluster_fault(cluster: ClusterConfig) -> tuple[str, str]:
    """The first key that cannot be used, and why; two empty texts when all can."""
    for name in WORDS:
        if re.search(r"[\s'\"\\]|[^ -~]", value := getattr(cluster, name)):
            return f"cluster.{name}", f"{value!r} must be one word of plain characters"
    if not cluster.time or TIME.fullmatch(cluster.time):
        return _lines_fault(cluster)
    forms = "minutes, hours:minutes:seconds, or days-hours:minutes:seconds"
    return "cluster.time", f"{cluster.time!r} is no time; write {forms}"


def _lines_fault(cluster: ClusterConfig) -> tuple[str, str]:
    for name in ("sbatch_args", "srun_args"):
        for option in getattr(cluster, name):
            if not option.startswith("-") or not option.isprintable():
                return f"cluster.{name}", f"{option!r} is no option; write for example --reservation=vision"
    for name in ("name", "container_image", "python"):
        if not getattr(cluster, name).isprintable():
            return f"cluster.{name}", "must be one line of printable characters"
    for mount in cluster.container_mounts:
        if "," in mount or ":" not in mount.strip(":") or not mount.isprintable():
            return "cluster.container_mounts", f"{mount!r} must be SOURCE:TARGET, without a comma"
    return "", ""
