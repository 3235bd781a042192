import io
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import JPEGLSLossless, RLELossless

from pretrain.data.inputs.dicom import hide
from tests.data.packing import fault, pack, packed
from tests.data.scans import dicom
from tests.data.scans import save_dicom as save

RANDOM = np.random.default_rng(0)


@pytest.fixture
def ct(tmp_path: Path) -> tuple[Path, list[np.ndarray]]:
    """Four slices in Hounsfield units, as scanners write them: stored from 0, intercept -1024."""
    stored = [RANDOM.integers(0, 2000, (12, 10), dtype=np.uint16) for _ in range(4)]
    stored[1][0, 0], stored[2][0, 0] = 0, 3071
    for i, pixels in enumerate(stored):
        dataset = dicom(pixels, RescaleSlope=1, RescaleIntercept=-1024, BitsStored=12, HighBit=11)
        save(tmp_path / "scan" / "series" / f"IM{i}.dcm", dataset)
    return tmp_path / "scan", [pixels.astype(np.int64) - 1024 for pixels in stored]


def test_a_series_spans_its_own_values(ct: tuple[Path, list[np.ndarray]], tmp_path: Path) -> None:
    src, slices = ct
    (src / "notes.txt").write_text("x")
    result = pack(src, tmp_path / "new").stdout.splitlines()
    assert result[:3] == [
        "4 images, 0 classes; order shuffled with seed 0",
        "1 other files ignored, such as notes.txt",
        "window -1024 to 2047 (HU): 4 images",
    ]
    for sample in packed(tmp_path / "new"):
        values = slices[int(sample.meta["source"][-5])]
        assert (sample.meta["window"], sample.meta["units"]) == ([-1024, 2047], "HU")
        pixels = sample.pixels()
        assert pixels.dtype == np.uint16 and sample.extension == "png"
        assert np.array_equal(np.rint(pixels / 65535 * 3071 - 1024), values)  # no value is lost


def test_a_window_is_linear_and_clips(ct: tuple[Path, list[np.ndarray]], tmp_path: Path) -> None:
    src, slices = ct
    assert "window -160 to 240 (HU): 4 images" in pack(src, tmp_path / "new", "--window", -160, 240).stdout
    for sample in packed(tmp_path / "new"):
        values = slices[int(sample.meta["source"][-5])]
        expected = np.clip((values + 160) / 400, 0, 1) * 65535
        assert np.abs(sample.pixels() - expected).max() <= 0.5
        assert sample.meta["window"] == [-160, 240]


def test_the_group_hides_the_patient(ct: tuple[Path, list[np.ndarray]], tmp_path: Path) -> None:
    src, _ = ct
    save(src / "other.dcm", dicom(np.eye(4, dtype=np.uint16), PatientID="Roe"))
    save(src / "nobody.dcm", dicom(np.eye(4, dtype=np.uint16), PatientID=None))
    pack(src, tmp_path / "new")
    groups = {sample.meta["source"]: sample.meta["group"] for sample in packed(tmp_path / "new")}
    first = {groups[f"series/IM{i}.dcm"] for i in range(4)}
    assert first == {hide("Doe^1957")} and len(hide("Doe^1957")) == 16
    assert groups["other.dcm"] == hide("Roe") not in first and groups["nobody.dcm"] is None
    contents = b"".join(path.read_bytes() for path in (tmp_path / "new").iterdir())
    assert b"Doe" not in contents and b"1957" not in contents
    pack(src, tmp_path / "ruled", "--group-from", r"([a-z]+)")
    assert {sample.meta["group"] for sample in packed(tmp_path / "ruled")} == {"series", "other", "nobody"}


def test_unsigned_16_bits_over_the_full_range_stay_as_they_are(tmp_path: Path) -> None:
    pixels = RANDOM.integers(0, 65536, (9, 8), dtype=np.uint16)
    pixels[0, :2] = 0, 65535
    src = save(tmp_path / "x.dcm", dicom(pixels, Modality="DX"))
    pack(src, tmp_path / "new")
    (sample,) = packed(tmp_path / "new")
    assert np.array_equal(sample.pixels(), pixels) and sample.meta["units"] == "unspecified"


def test_low_values_that_are_bright(tmp_path: Path) -> None:
    pixels = np.array([[0, 65535], [1000, 2000]], np.uint16)
    save(tmp_path / "x.dcm", dicom(pixels, PhotometricInterpretation="MONOCHROME1"))
    pack(tmp_path / "x.dcm", tmp_path / "new")
    assert np.array_equal(packed(tmp_path / "new")[0].pixels(), 65535 - pixels)


def test_padding_does_not_widen_the_window(tmp_path: Path) -> None:
    pixels = np.array([[-2000, -1000], [0, 1000]], np.int16)
    save(tmp_path / "x.dcm", dicom(pixels, PixelPaddingValue=-2000))
    pack(tmp_path / "x.dcm", tmp_path / "new")
    (sample,) = packed(tmp_path / "new")
    assert sample.meta["window"] == [-1000, 1000]
    assert sample.pixels().tolist() == [[0, 0], [32768, 65535]]


def test_frames_have_their_own_slopes(tmp_path: Path) -> None:
    pixels = RANDOM.integers(0, 100, (3, 6, 5), dtype=np.uint16)
    frames = []
    for slope in (1, 2, 4):
        values, frame = Dataset(), Dataset()
        values.RescaleSlope, values.RescaleIntercept, values.RescaleType = slope, 10, "HU"
        frame.PixelValueTransformationSequence = Sequence([values])
        frames.append(frame)
    dataset = dicom(pixels, 3, PerFrameFunctionalGroupsSequence=Sequence(frames))
    save(tmp_path / "x.dcm", dataset)
    pack(tmp_path / "x.dcm", tmp_path / "new", "--window", 0, 65535)
    found = {sample.meta["source"]: sample for sample in packed(tmp_path / "new")}
    for i, slope in enumerate((1, 2, 4)):
        assert np.array_equal(found[f"x.dcm#{i}"].pixels(), pixels[i] * slope + 10)


def test_colour_stays_8_bits(tmp_path: Path) -> None:
    pixels = RANDOM.integers(0, 256, (6, 5, 3), dtype=np.uint8)
    colour = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0}
    save(tmp_path / "src" / "x.dcm", dicom(pixels, **colour))
    palette = RANDOM.integers(0, 256, (3, 256), dtype=np.uint16)
    tables = {
        f"{name}PaletteColorLookupTable{part}": value
        for name, row in zip(("Red", "Green", "Blue"), palette, strict=True)
        for part, value in (("Descriptor", [256, 0, 16]), ("Data", (row * 257).tobytes()))
    }
    numbers = RANDOM.integers(0, 256, (6, 6), dtype=np.uint8)
    save(tmp_path / "src" / "y.dcm", dicom(numbers, PhotometricInterpretation="PALETTE COLOR", **tables))
    pack(tmp_path / "src", tmp_path / "new")
    found = {sample.meta["source"]: sample for sample in packed(tmp_path / "new")}
    assert np.array_equal(found["x.dcm"].pixels(), pixels) and "window" not in found["x.dcm"].meta
    assert np.array_equal(found["y.dcm"].pixels(), palette.T[numbers])


def test_what_cannot_be_read_is_listed_with_the_missing_package(tmp_path: Path) -> None:
    src, pixels = tmp_path / "src", np.arange(16, dtype=np.uint16).reshape(4, 4)
    save(src / "good.dcm", dicom(pixels))
    packed_pixels = dicom(pixels)
    packed_pixels.file_meta.TransferSyntaxUID = JPEGLSLossless
    packed_pixels.PixelData = encapsulate([b"\xff\xd8\xff\xf7"])
    packed_pixels["PixelData"].VR = "OB"
    save(src / "jpegls.dcm", packed_pixels)
    (src / "text.dcm").write_text("hello")
    save(src / "report.dcm", dicom(pixels, Rows=None, PixelData=None))
    (src / "cut.dcm").write_bytes((src / "good.dcm").read_bytes()[:-7])
    for name, arguments in (("new", ()), ("windowed", ("--window", "0", "15"))):
        assert "4 files not packed" in pack(src, tmp_path / name, *arguments).stdout
        lines = (tmp_path / name / "unreadable-train.txt").read_text().splitlines()
        reasons = dict(line.split("\t") for line in lines)
        assert set(reasons) == {"jpegls.dcm", "text.dcm", "report.dcm", "cut.dcm"}
        assert "JPEG-LS" in reasons["jpegls.dcm"] and "requires numpy and pyjpegls" in reasons["jpegls.dcm"]
        assert reasons["report.dcm"] == "a DICOM file without an image"


def test_a_compression_that_pydicom_reads(tmp_path: Path) -> None:
    pixels = np.tile(np.array([0, 7, 65535, 9], np.uint16), (4, 1))
    dataset = dicom(pixels)
    dataset.compress(RLELossless)
    save(tmp_path / "x.dcm", dataset)
    pack(tmp_path / "x.dcm", tmp_path / "new")
    assert np.array_equal(packed(tmp_path / "new")[0].pixels(), pixels)


def test_names_as_scanners_give_them(tmp_path: Path) -> None:
    pixels = np.arange(16, dtype=np.uint16).reshape(4, 4)
    for name in ("IM0001", "1.2.840.113619.2", "x.DCM"):
        save(tmp_path / "src" / name, dicom(pixels))
    save(tmp_path / "src" / "DICOMDIR", dicom(pixels))
    (tmp_path / "src" / "README").write_text("x")
    pack(tmp_path / "src", tmp_path / "new")
    assert {sample.meta["source"] for sample in packed(tmp_path / "new")} == {
        *("IM0001", "1.2.840.113619.2", "x.DCM")
    }


def test_labels_from_a_list(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save(tmp_path / f"{name}.dcm", dicom(np.eye(4, dtype=np.uint16)))
    (tmp_path / "list").write_text("a.dcm\tsick\tanna\nb.dcm\twell\n")
    pack(tmp_path / "list", tmp_path / "new")
    found = {sample.label: sample.meta["group"] for sample in packed(tmp_path / "new")}
    assert found == {0: "anna", 1: hide("Doe^1957")}


@pytest.mark.parametrize("window", [("5", "5"), ("6", "5"), ("nan", "5"), ("0", "inf")])
def test_windows_that_make_no_sense(tmp_path: Path, window: tuple[str, str]) -> None:
    src = save(tmp_path / "x.dcm", dicom(np.eye(4, dtype=np.uint16)))
    assert "give two numbers, the smaller one first" in fault(src, tmp_path / "new", "--window", *window)
    assert "command line" in fault(src, tmp_path / "new", "--window", "low", "5")


def test_without_pydicom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src = save(tmp_path / "x.dcm", dicom(np.eye(4, dtype=np.uint16)))
    monkeypatch.setitem(sys.modules, "pydicom", None)
    assert fault(src, tmp_path / "new") == "pack.py: needs pydicom: pip install pydicom\n"


def test_the_pngs_hold_16_bits(ct: tuple[Path, list[np.ndarray]], tmp_path: Path) -> None:
    pack(ct[0], tmp_path / "new")
    assert {Image.open(io.BytesIO(sample.image)).mode for sample in packed(tmp_path / "new")} == {"I;16"}
