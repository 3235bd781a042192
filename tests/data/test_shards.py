from pathlib import Path

import pytest

from pretrain.data.shards import list_shards, shard_names


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
def test_where_files_must_be_local_remote_ones_are_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"--index: .*must be a local file"):
        list_shards([pattern], "--index")


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("https://host/x-{08..10}.tar", [f"https://host/x-{i}.tar" for i in ("08", "09", "10")]),
        ("https://[::1]:80/x.tar?part=1", ["https://[::1]:80/x.tar?part=1"]),
        (
            "pipe:aws s3 cp s3://b/x-{0,1}.tar -",
            ["pipe:aws s3 cp s3://b/x-0.tar -", "pipe:aws s3 cp s3://b/x-1.tar -"],
        ),
        ("pipe:cat /d/x*.tar", ["pipe:cat /d/x*.tar"]),
    ],
)
def test_addresses_have_braces(pattern: str, names: list[str]) -> None:
    assert shard_names([pattern], "data.shards") == names


def test_local_and_remote_shards_follow_one_another(folder: Path) -> None:
    patterns = [f"file://{folder}/a-00{{1,2}}.tar", "s3://bucket/a.tar", str(folder / "b.tar")]
    expected = [
        str(folder / "a-001.tar"),
        str(folder / "a-002.tar"),
        "s3://bucket/a.tar",
        str(folder / "b.tar"),
    ]
    assert shard_names(patterns, "data.shards") == expected


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["https://host/x-*.tar"], r"https://host/x-\*.tar: an address has no wildcards; use braces"),
        (["s3://bucket/x-[0-9].tar"], "an address has no wildcards"),
        (["https://host/{0..3.tar"], "braces do not match"),
        (["https://host/1.tar", "https://host/{0..3}.tar"], "https://host/1.tar is named twice"),
    ],
)
def test_addresses_that_cannot_be_used(patterns: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=f"^data.shards: .*{message}"):
        shard_names(patterns, "data.shards")


def test_many_names(folder: Path) -> None:
    names = shard_names(["https://host/train-{000000..009999}.tar"], "data.shards")
    assert (len(names), names[-1]) == (10_000, "https://host/train-009999.tar")
