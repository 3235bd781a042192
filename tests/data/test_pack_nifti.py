import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest

from tests.data.packing import Packed, fault, pack, packed
from tests.data.scans import save_nifti as save

RANDOM = np.random.default_rng(0)


def by_name(dst: Path) -> dict[str, Packed]:
    return {sample.meta["source"]: sample for sample in packed(dst)}


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_slices_of_bids_files(tmp_path: Path, suffix: str) -> None:
    volumes = [RANDOM.integers(-500, 2000, (7, 6, 5), dtype=np.int16) for _ in range(2)]
    for i, volume in enumerate(volumes):
        save(tmp_path / "bids" / f"sub-0{i}" / "anat" / f"sub-0{i}_T1w{suffix}", volume)
        (tmp_path / "bids" / f"sub-0{i}" / "anat" / f"sub-0{i}_T1w.json").write_text("{}")
    stdout = pack(tmp_path / "bids", tmp_path / "new").stdout
    assert stdout.splitlines()[0] == (
        "10 images, 0 classes; volumes shuffled with seed 0, slices mixed in blocks of 256 MB"
    )
    assert "2 other files ignored" in stdout and stdout.count("(unspecified): 5 images") == 2
    samples = by_name(tmp_path / "new")
    assert len(samples) == 10
    for i, volume in enumerate(volumes):
        low, high = int(volume.min()), int(volume.max())
        for z in range(5):
            sample = samples[f"sub-0{i}/anat/sub-0{i}_T1w{suffix}#{z}"]
            assert sample.meta["group"] == f"sub-0{i}" and sample.label is None
            assert sample.meta["window"] == [low, high]
            values = sample.pixels() / 65535 * (high - low) + low
            assert sample.pixels().dtype == np.uint16
            assert np.array_equal(np.rint(values), volume[:, :, z].T)
    order = [sample.meta["source"] for sample in packed(tmp_path / "new")]
    assert len({name.split("/")[0] for name in order[:5]}) == 2 and order != sorted(order)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_axes(tmp_path: Path, axis: int) -> None:
    volume = RANDOM.integers(0, 65536, (7, 6, 5), dtype=np.uint16)
    pack(save(tmp_path / "x.nii", volume), tmp_path / "new", "--axis", axis, "--window", 0, 65535)
    samples = by_name(tmp_path / "new")
    assert len(samples) == volume.shape[axis]
    for number in range(volume.shape[axis]):
        assert np.array_equal(samples[f"x.nii#{number}"].pixels(), volume.take(number, axis).T)
        assert samples[f"x.nii#{number}"].meta["group"] == "x.nii"


def test_the_window_is_in_the_files_units(tmp_path: Path) -> None:
    volume = RANDOM.integers(0, 1000, (4, 4, 2), dtype=np.int16)
    src = save(tmp_path / "x.nii", volume, slope=-2.0, intercept=100.0)
    pack(src, tmp_path / "new", "--window", -1000, 0)
    for name, sample in by_name(tmp_path / "new").items():
        values = volume[:, :, int(name[-1])].T * -2.0 + 100
        assert np.abs(sample.pixels() - np.clip((values + 1000) / 1000, 0, 1) * 65535).max() <= 0.5
    pack(src, tmp_path / "own")
    window = packed(tmp_path / "own")[0].meta["window"]
    assert window == [-2.0 * volume.max() + 100, -2.0 * volume.min() + 100]


def test_constant_slices_are_counted(tmp_path: Path) -> None:
    volume = RANDOM.integers(1, 1000, (4, 4, 6), dtype=np.int16)
    volume[..., [0, 5]] = 0
    src = save(tmp_path / "x.nii.gz", volume)
    result = pack(src, tmp_path / "new").stdout
    assert "4 images in 1 shards" in result and "2 constant slices skipped; 0 files not packed" in result
    assert set(by_name(tmp_path / "new")) == {f"x.nii.gz#{z}" for z in (1, 2, 3, 4)}
    assert (
        "not one image can be read" in pack(src, tmp_path / "none", "--window", 5000, 6000, status=2).stderr
    )


def test_a_series_of_volumes_and_values_that_are_no_numbers(tmp_path: Path) -> None:
    values = RANDOM.random((4, 3, 2, 3)).astype(np.float32)
    values[0, 0, 0, 0], values[1, 0, 0, 0] = np.nan, np.inf
    pack(save(tmp_path / "x.nii", values), tmp_path / "new")
    samples = by_name(tmp_path / "new")
    assert set(samples) == {f"x.nii#{t}:{z}" for t in range(3) for z in range(2)}
    finite = values[np.isfinite(values)]
    assert samples["x.nii#0:0"].meta["window"] == [finite.min(), finite.max()]
    assert samples["x.nii#0:0"].pixels()[0, :2].tolist() == [0, 65535]


def test_what_cannot_be_read_is_listed(tmp_path: Path) -> None:
    src = tmp_path / "src"
    volume = RANDOM.integers(0, 99, (4, 4, 2), dtype=np.int16)
    save(src / "good.nii", volume)
    content = save(src / "cut.nii.gz", RANDOM.integers(0, 999, (32, 32, 8), dtype=np.int16)).read_bytes()
    (src / "cut.nii.gz").write_bytes(content[: len(content) // 2])
    (src / "text.nii").write_text("x" * 400)
    (src / "empty.nii.gz").write_bytes(b"")
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 2), np.complex64), np.eye(4)), src / "complex.nii")
    nibabel.save(nibabel.Nifti1Image(np.zeros((2, 2, 2, 1, 3), np.int16), np.eye(4)), src / "vector.nii")
    axes = nibabel.cifti2.ScalarAxis(["a"]), nibabel.cifti2.BrainModelAxis.from_mask(np.ones((2, 2, 2)))
    nibabel.save(nibabel.Cifti2Image(np.zeros((1, 8), np.float32), axes), src / "surface.dscalar.nii")
    assert "2 images in 1 shards" in pack(src, tmp_path / "new").stdout
    lines = (tmp_path / "new" / "unreadable-train.txt").read_text().splitlines()
    reasons = dict(line.split("\t") for line in lines)
    assert set(reasons) == {
        "cut.nii.gz",
        "text.nii",
        "empty.nii.gz",
        "complex.nii",
        "vector.nii",
        "surface.dscalar.nii",
    }
    assert reasons["vector.nii"] == "has 5 axes; images have 2 to 4"
    assert "complex64" in reasons["complex.nii"]


def test_wrong_axes(tmp_path: Path) -> None:
    src = save(tmp_path / "x.nii", np.ones((2, 2, 2), np.int16))
    assert "--axis 3: must be 0, 1 or 2" in fault(src, tmp_path / "new", "--axis", 3)


def test_without_nibabel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src = save(tmp_path / "x.nii", np.ones((2, 2, 2), np.int16))
    monkeypatch.setitem(sys.modules, "nibabel", None)
    assert fault(src, tmp_path / "new") == "pack.py: needs nibabel: pip install nibabel\n"
