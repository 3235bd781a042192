"""The virtual cluster that the tests of a session share."""

import os
from collections.abc import Iterator

import pytest

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
