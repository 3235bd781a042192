from pathlib import Path

import pytest

from pretrain.data.shards import list_shards


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a-000.tar", "a-001.tar", "a-002.tar", "b.tar"):
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("b.tar", ["b.tar"]),
        ("a-*.tar", ["a-000.tar", "a-001.tar", "a-002.tar"]),
        ("a-00[02].tar", ["a-000.tar", "a-002.tar"]),
        ("a-{001..002}.tar", ["a-001.tar", "a-002.tar"]),
        ("{b,a-000}.tar", ["b.tar", "a-000.tar"]),
        ("{b,a-*}.tar", ["b.tar", "a-000.tar", "a-001.tar", "a-002.tar"]),
    ],
)
def test_patterns_keep_their_order(folder: Path, pattern: str, names: list[str]) -> None:
    assert list_shards([str(folder / pattern)], "data.shards") == [folder / name for name in names]


def test_several_patterns_follow_one_another(folder: Path) -> None:
    found = list_shards([str(folder / "b.tar"), str(folder / "a-*.tar")], "data.shards")
    assert [path.name for path in found] == ["b.tar", "a-000.tar", "a-001.tar", "a-002.tar"]


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ([], "is empty"),
        (["c-*.tar"], "no shard matches .*c-"),
        (["c.tar"], "no shard .*c.tar"),
        (["a-{000..005}.tar"], r"no shard .*a-003.tar \(of .*\{000..005\}"),
        (["a-{000..005.tar"], "braces do not match"),
        (["."], r"is a folder; write .*\*.tar"),
        (["a-000.tar", "a-*.tar"], "a-000.tar is named twice"),
    ],
)
def test_errors_name_setting_and_pattern(folder: Path, patterns: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=f"^log.knn.train: .*{message}"):
        list_shards([str(folder / pattern) for pattern in patterns], "log.knn.train")


@pytest.mark.parametrize("pattern", ["s3://bucket/a.tar", "https://host/{0..3}.tar", "pipe:cat a.tar"])
def test_remote_shards_are_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"data.shards: .*remote shards are not supported"):
        list_shards([pattern], "data.shards")
