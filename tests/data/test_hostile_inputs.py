"""What a folder to be packed may hold: loops, pipes, other kinds of files, sizes without pixels."""

import gzip
import os
import struct
from pathlib import Path
from tempfile import TemporaryDirectory

import nibabel
import numpy as np
import pytest
import tifffile
from PIL import Image

from pretrain.analysis.images import ImageSet
from pretrain.analysis.masks import read_masks
from pretrain.config.schema import DecodeConfig
from pretrain.data.decode import decode
from pretrain.data.inputs.classes import read_classes
from pretrain.data.inputs.listing import list_files
from pretrain.errors import InputError
from tests.data.packing import fault, pack, picture
from tests.data.scans import dicom, save_dicom, save_nifti

PIXELS = np.zeros((20, 30, 9), np.uint8)
NOBODY = 65_534  # the user without rights


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        (folder / name / "a.jpg").write_bytes(picture(len(name)))
    return folder


@pytest.mark.parametrize(
    "links",
    [
        pytest.param({"cat/up": ".."}, id="to a folder above"),
        pytest.param({"cat/self": "."}, id="to its own folder"),
        pytest.param({"cat/x": "../dog", "dog/y": "../cat"}, id="to one another"),
        pytest.param({"cat/root": "/"}, id="to the root"),
    ],
)
def test_links_that_lead_round_and_round(links: dict[str, str], photos: Path) -> None:
    for name, target in links.items():
        (photos / name).symlink_to(target)
    assert "which it lies in; remove it" in fault(photos, photos.parent / "out")


def test_class_folders_may_be_links(photos: Path) -> None:
    (photos / "hound").symlink_to("dog")
    assert "3 images, 3 classes" in pack(photos, photos.parent / "out").stdout


def test_names_of_bytes_that_are_no_letters(photos: Path) -> None:
    odd = photos / os.fsdecode(b"\xff\n")
    odd.mkdir()
    (odd / "a.jpg").write_bytes(picture(7))
    (odd / os.fsdecode(b"\xfe.txt")).write_bytes(b"x")
    out = photos.parent / "out"
    assert "3 images in 1 shards" in pack(photos, out).stdout
    assert read_classes(out / "classes.json") == ["cat", "dog", odd.name]
    (line,) = (out / "unreadable-train.txt").read_text().splitlines()
    assert line == "\\udcff /\\udcfe.txt\tnot named like an image"
    pack(photos, out, "--prefix", "test")  # which reads the classes


def test_a_folder_that_cannot_be_read_is_not_left_out() -> None:
    with TemporaryDirectory() as name:  # below folders that anybody may enter
        folder = Path(name)
        folder.chmod(0o755)
        for part in ("open", "closed"):
            (folder / "photos" / part).mkdir(parents=True)
            (folder / "photos" / part / "a.jpg").write_bytes(picture(1))
        (folder / "photos/closed").chmod(0)
        user = os.geteuid()
        try:
            if user == 0:
                os.seteuid(NOBODY)
            with pytest.raises(InputError, match=r"photos/closed: Permission denied; make it readable"):
                list_files(folder / "photos")
        finally:
            os.seteuid(user)
            (folder / "photos/closed").chmod(0o755)


def test_a_pipe_among_the_images_is_not_waited_for(photos: Path) -> None:
    os.mkfifo(photos / "cat/b.jpg")
    assert "b.jpg: is a pipe, socket or device" in fault(photos, photos.parent / "out")
    (photos.parent / "list.txt").write_text("photos/cat/a.jpg\nphotos/cat/b.jpg\n")
    said = fault(photos.parent / "list.txt", photos.parent / "out")
    assert "line 2: photos/cat/b.jpg is not a file" in said


@pytest.mark.parametrize("prefix", ["../train", "a/b", "*", "tr?in", "-x", "", "/tmp/x"])
def test_a_prefix_that_is_no_name(prefix: str, photos: Path) -> None:
    said = fault(photos, photos.parent / "out", f"--prefix={prefix}", "--force")
    assert "must be letters, digits, dots, dashes and underscores" in said or "argument" in said


def test_force_leaves_the_shards_of_longer_prefixes(photos: Path) -> None:
    out = photos.parent / "out"
    pack(photos, out, "--prefix", "train-extra")
    kept = (out / "train-extra-000000.tar").read_bytes()
    pack(photos, out, "--prefix", "train", "--force")
    pack(photos, out, "--prefix", "train", "--force")
    assert (out / "train-extra-000000.tar").read_bytes() == kept


def test_a_tiff_of_many_bands_is_judged_before_memory_is_taken(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", PIXELS, photometric="minisblack", planarconfig="contig")
    content = (tmp_path / "a.tif").read_bytes()
    assert decode(content, DecodeConfig(max_pixels=1350), 9).shape == (20, 30, 9)
    with pytest.raises(ValueError, match="270 x 20 levels are more than 5396"):
        decode(content, DecodeConfig(max_pixels=1349), 9)


def test_a_page_that_claims_to_be_huge(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    path = tmp_path / "in/a.tif"
    pages = [Image.fromarray(np.full((8, 8), value, np.uint8)) for value in (1, 2)]
    pages[0].save(path, save_all=True, append_images=pages[1:])
    content = path.read_bytes()
    for tag in (256, 257):  # width and height of each page
        content = content.replace(struct.pack("<HHII", tag, 4, 1, 8), struct.pack("<HHII", tag, 4, 1, 60_000))
        content = content.replace(struct.pack("<HHII", tag, 3, 1, 8), struct.pack("<HHII", tag, 3, 1, 60_000))
    path.write_bytes(content)
    pack(tmp_path / "in", tmp_path / "out", status=2)
    lines = (tmp_path / "out/unreadable-train.txt").read_text().splitlines()
    assert len(lines) == 2 and all("60000 x 60000 pixels are more than" in line for line in lines)


def test_a_volume_that_claims_what_no_file_of_its_size_can_hold(tmp_path: Path) -> None:
    path = tmp_path / "a.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 4), np.int16), np.eye(4)), path)
    content = bytearray(gzip.decompress(path.read_bytes()))
    struct.pack_into("<hhhh", content, 40, 3, 10_000, 10_000, 400)
    path.write_bytes(gzip.compress(content))
    pack(path, tmp_path / "out", status=2)
    assert "claims 80,000,000,000 bytes" in (tmp_path / "out/unreadable-train.txt").read_text()


@pytest.mark.parametrize("size", [0, -4, 32_767])
def test_a_volume_of_no_size_or_of_slices_without_bounds(size: int, tmp_path: Path) -> None:
    path = save_nifti(tmp_path / "in/a.nii", np.arange(64, dtype=np.int16).reshape(4, 4, 4))
    save_nifti(tmp_path / "in/good.nii", np.arange(64, dtype=np.int16).reshape(4, 4, 4))
    content = bytearray(path.read_bytes())
    struct.pack_into("<hh", content, 42, size, max(size, 4))
    path.write_bytes(content)
    assert "4 images in 1 shards" in pack(path.parent, tmp_path / "out").stdout
    (line,) = (tmp_path / "out/unreadable-train.txt").read_text().splitlines()
    assert "has no voxels" in line or "pixels are more than" in line or "not a NIfTI file" in line


def test_slices_and_pages_longer_than_a_png(tmp_path: Path) -> None:
    long = np.zeros((1, 1_000_001), np.uint16)
    long[0, 0] = 1
    (tmp_path / "in").mkdir()
    nibabel.save(nibabel.Nifti2Image(long[..., None], np.eye(4)), tmp_path / "in/a.nii")
    pack(tmp_path / "in", tmp_path / "out", status=2)
    (tmp_path / "tif").mkdir()
    with tifffile.TiffWriter(tmp_path / "tif/a.tif") as file:
        for _ in range(2):
            file.write(np.repeat(long[..., None], 3, axis=2), photometric="rgb")
    pack(tmp_path / "tif", tmp_path / "out", "--prefix", "tif", status=2)
    for prefix, count in (("train", 1), ("tif", 2)):
        lines = (tmp_path / f"out/unreadable-{prefix}.txt").read_text().splitlines()
        assert len(lines) == count and all("a side of a PNG has 1,000,000 at most" in line for line in lines)


@pytest.mark.parametrize("window", [(), ("--window", "0", "9")])
@pytest.mark.parametrize(
    ("elements", "reason"),
    [
        ({"NumberOfFrames": 2**31 - 1}, "claims 2,147,483,647 frames in a file of"),
        ({"NumberOfFrames": -3}, "claims -3 frames in a file of"),
        ({"Rows": 65_535, "Columns": 65_535}, "65535 x 65535 pixels are more than"),
    ],
)
def test_a_dicom_file_that_claims_what_it_cannot_hold(
    elements: dict[str, int], reason: str, window: tuple[str, ...], tmp_path: Path
) -> None:
    grey = np.arange(16, dtype=np.uint16).reshape(4, 4)
    save_dicom(tmp_path / "in/a.dcm", dicom(grey, **elements))
    save_dicom(tmp_path / "in/good.dcm", dicom(grey))
    assert "1 images in 1 shards" in pack(tmp_path / "in", tmp_path / "out", *window).stdout
    (line,) = (tmp_path / "out/unreadable-train.txt").read_text().splitlines()
    assert line.startswith(f"a.dcm\t{reason}")


def test_a_mask_is_never_handed_to_another_program(tmp_path: Path) -> None:
    """Pillow would open PostScript under any name, and start Ghostscript for its pixels."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "masks").mkdir()
    (tmp_path / "photos/a.jpg").write_bytes(picture(1))
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n"
    (tmp_path / "masks/a.png").write_bytes(script)
    with pytest.raises(InputError, match=r"a\.png: cannot be read as the mask of a\.jpg \(cannot identify"):
        read_masks(tmp_path / "masks", ImageSet(str(tmp_path / "photos"), 16), [0])
