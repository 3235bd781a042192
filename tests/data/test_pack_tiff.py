import io
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from pretrain.data.inputs.tiff import full_pages, read_page
from tests.data.packing import pack, packed, picture

RANDOM = np.random.default_rng(0)


def pages(count: int, *shape: int, kind: type = np.uint8) -> list[np.ndarray]:
    return [RANDOM.integers(0, np.iinfo(kind).max + 1, shape, dtype=kind) for _ in range(count)]


def save(path: Path, arrays: list[np.ndarray], **options: object) -> Path:
    """By Pillow, as one file of several pages."""
    first, *others = map(Image.fromarray, arrays)
    path.parent.mkdir(exist_ok=True)
    first.save(path, "TIFF", save_all=True, append_images=others, **options)
    return path


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_deflate"])
def test_each_page_is_an_image(tmp_path: Path, kind: type, compression: str) -> None:
    arrays = pages(3, 9, 7, kind=kind)
    save(tmp_path / "stacks" / "cells.tif", arrays, compression=compression)
    assert "3 images in 1 shards" in pack(tmp_path / "stacks", tmp_path / "new").stdout
    samples = sorted(packed(tmp_path / "new"), key=lambda sample: sample.meta["source"])
    assert [sample.meta["source"] for sample in samples] == [f"cells.tif#{i}" for i in range(3)]
    assert {sample.meta["group"] for sample in samples} == {"cells.tif"}
    for sample, array in zip(samples, arrays, strict=True):
        assert sample.extension == "png"
        assert sample.pixels().dtype == kind and np.array_equal(sample.pixels(), array)


def test_one_page_keeps_its_bytes_and_classes_their_labels(tmp_path: Path) -> None:
    one = save(tmp_path / "photos" / "one.tiff", pages(1, 8, 8, 3))
    two = save(tmp_path / "photos" / "two.tif", pages(2, 8, 8, 3))
    (tmp_path / "list").write_text(f"{one}\tcat\n{two}\tdog\tanna\n")
    pack(tmp_path / "list", tmp_path / "new")
    found = {sample.meta["source"]: sample for sample in packed(tmp_path / "new")}
    assert found[str(one)].image == one.read_bytes() and found[str(one)].extension == "tiff"
    assert (found[str(one)].label, found[str(one)].meta["group"]) == (0, None)
    for i in range(2):
        assert (found[f"{two}#{i}"].label, found[f"{two}#{i}"].meta["group"]) == (1, "anna")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_modes_lose_nothing(tmp_path: Path, mode: str) -> None:
    images = [Image.fromarray(array).convert(mode) for array in pages(2, 6, 5, 3)]
    images[0].save(tmp_path / "x.tif", save_all=True, append_images=images[1:])
    for number, image in enumerate(images):
        extension, content = read_page(tmp_path / "x.tif", number)
        assert extension == ("tif" if mode == "CMYK" else "png")
        found = Image.open(io.BytesIO(content))
        assert found.mode == mode and np.array_equal(np.asarray(found), np.asarray(image))


def test_big_endian_values(tmp_path: Path) -> None:
    arrays = pages(2, 6, 5, kind=np.uint16)
    tifffile.imwrite(tmp_path / "x.tif", np.stack(arrays), byteorder=">", photometric="minisblack")
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(read_page(tmp_path / "x.tif", 1)[1]))), arrays[1])


@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_colour_of_16_bits(tmp_path: Path, planar: str) -> None:
    arrays = np.stack(pages(2, 6, 5, 3, kind=np.uint16))
    stored = arrays if planar == "contig" else np.moveaxis(arrays, -1, 1)
    tifffile.imwrite(tmp_path / "x.tif", stored, photometric="rgb", planarconfig=planar)
    pack(tmp_path / "x.tif", tmp_path / "new")
    for sample in packed(tmp_path / "new"):
        assert sample.image[24:26] == b"\x10\x02"  # a PNG of 16 bits in colour
    extension, content = read_page(tmp_path / "x.tif", 1)
    assert extension == "png"
    assert np.array_equal(_png_of_16_bits(content), arrays[1])


def _png_of_16_bits(content: bytes) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)[..., ::-1]


def test_many_channels_become_a_tiff_of_one_page(tmp_path: Path) -> None:
    arrays = np.stack(pages(2, 6, 5, 6, kind=np.uint16))
    tifffile.imwrite(tmp_path / "x.tif", arrays, photometric="minisblack", planarconfig="contig")
    assert full_pages(tmp_path / "x.tif") == [0, 1]
    extension, content = read_page(tmp_path / "x.tif", 1)
    assert extension == "tif" and np.array_equal(tifffile.imread(io.BytesIO(content)), arrays[1])


def test_extra_channels_are_not_dropped(tmp_path: Path) -> None:
    arrays = np.stack(pages(2, 6, 5, 5))  # Pillow would read three of them
    tifffile.imwrite(tmp_path / "x.tif", arrays, photometric="rgb", planarconfig="contig")
    extension, content = read_page(tmp_path / "x.tif", 0)
    assert extension == "tif" and np.array_equal(tifffile.imread(io.BytesIO(content)), arrays[0])


def test_smaller_versions_of_a_page_are_no_images(tmp_path: Path) -> None:
    large, small = pages(1, 32, 32, 3)[0], pages(1, 16, 16, 3)[0]
    with tifffile.TiffWriter(tmp_path / "slide.tif") as tiff:
        tiff.write(large, photometric="rgb")
        tiff.write(small, photometric="rgb", subfiletype=1)
    assert full_pages(tmp_path / "slide.tif") == [0]
    pack(tmp_path / "slide.tif", tmp_path / "new")
    (sample,) = packed(tmp_path / "new")
    assert sample.image == (tmp_path / "slide.tif").read_bytes()


@pytest.mark.parametrize("kind", [np.float32, np.int32, np.float64])
def test_values_without_a_range_are_refused_in_one_line(tmp_path: Path, kind: type) -> None:
    (tmp_path / "photos").mkdir()
    tifffile.imwrite(tmp_path / "photos" / "x.tif", np.zeros((3, 6, 5), kind), photometric="minisblack")
    (tmp_path / "photos" / "y.jpg").write_bytes(picture(0))
    assert "1 files not packed" in pack(tmp_path / "photos", tmp_path / "new").stdout
    (line,) = (tmp_path / "new" / "unreadable-train.txt").read_text().splitlines()
    assert line.startswith("x.tif\tpixels are ") and "convert them to 8 or 16 bits" in line


def test_without_tifffile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = np.stack(pages(2, 6, 5, 3, kind=np.uint16))
    (tmp_path / "photos").mkdir()
    tifffile.imwrite(tmp_path / "photos" / "x.tif", arrays, photometric="rgb")
    save(tmp_path / "photos" / "y.tif", pages(2, 6, 5))
    monkeypatch.setitem(sys.modules, "tifffile", None)
    assert "2 images in 1 shards" in pack(tmp_path / "photos", tmp_path / "new").stdout
    report = (tmp_path / "new" / "unreadable-train.txt").read_text()
    assert report == "x.tif\tneeds tifffile: pip install tifffile\n"


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of what it meets in a cut file
@pytest.mark.parametrize("length", [6, 100, 700])
def test_cut_files_are_listed(tmp_path: Path, length: int) -> None:
    whole = save(tmp_path / "photos" / "x.tif", pages(2, 16, 16, 3)).read_bytes()
    (tmp_path / "photos" / "x.tif").write_bytes(whole[:length])
    (tmp_path / "photos" / "y.jpg").write_bytes(picture(0))
    assert "1 images in 1 shards" in pack(tmp_path / "photos", tmp_path / "new").stdout
    report = (tmp_path / "new" / "unreadable-train.txt").read_text()
    assert report.startswith("x.tif") and report.count("\t") == report.count("\n")
