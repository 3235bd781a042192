"""What several test files read."""

from pathlib import Path

import pytest

from pretrain.data.digits import write_digits


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the digits as train-*.tar and test-*.tar; not to be changed."""
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder)
    return folder
