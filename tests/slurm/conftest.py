"""The virtual cluster that the tests of a session share."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.runs import Shell, write_config
from tests.slurm.virtual_cluster import VirtualCluster, temporary_cluster, unavailable


@pytest.fixture(scope="session")
def slurm() -> None:
    """Slurm can run here; continuous integration installs it, so that there its absence is a failure."""
    if reason := unavailable():
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)


@pytest.fixture(scope="session")
def cluster(slurm: None) -> Iterator[VirtualCluster]:
    """Four nodes of eight GPUs; a test that kills a node starts it again."""
    with temporary_cluster(nodes=4, send_user_signal=False) as started:
        yield started


@pytest.fixture(scope="session")
def reference(cluster: VirtualCluster, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on 2 machines x 2 processes that nothing has disturbed."""
    folder = tmp_path_factory.mktemp("reference")
    job = Shell(cluster, folder).launch(write_config(folder, shards))
    cluster.wait_for(job, "COMPLETED", 120)
    return folder / "run"
