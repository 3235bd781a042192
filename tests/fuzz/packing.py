"""DICOM, NIfTI and parquet, which `tools/pack.py` reads with libraries of others."""

import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import RLELossless

from pretrain.data.verify import verify_shard
from tests.data.pictures import encode
from tests.data.scans import dicom, save_dicom, save_nifti
from tests.fuzz.cases import CORRUPT, WORKED, Files
from tools.pack import pack, parse

WINDOW = ("--window", "0", "2000")
CELLS = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def dicom_examples(folder: Path) -> list[Files]:
    """Grey, inverted with padding, frames with slopes of their own, colour, a palette, compressed."""
    generator = np.random.default_rng(0)
    grey = generator.integers(0, 4096, (6, 5), dtype=np.uint16)
    colour = generator.integers(0, 256, (6, 5, 3), dtype=np.uint8)
    compressed = dicom(np.tile(grey[:1], (6, 1)))
    compressed.compress(RLELossless, generate_instance_uid=False)
    files = [
        dicom(grey, RescaleSlope=1, RescaleIntercept=-1024, BitsStored=12, HighBit=11),
        dicom(grey.astype(np.int16), PhotometricInterpretation="MONOCHROME1", PixelPaddingValue=7),
        dicom(np.stack([grey, grey]), 2, PerFrameFunctionalGroupsSequence=Sequence([_slope(1), _slope(2)])),
        dicom(colour, SamplesPerPixel=3, PhotometricInterpretation="RGB", PlanarConfiguration=0),
        dicom(colour[..., 0], PhotometricInterpretation="PALETTE COLOR", **_palette()),
        compressed,
    ]
    contents = [save_dicom(folder / "x.dcm", file).read_bytes() for file in files]
    return [{"in/a.dcm": content} for content in contents] + [
        {"in/a.dcm": contents[0], "in/b.dcm": contents[1]}
    ]


def _slope(slope: int) -> Dataset:
    values, frame = Dataset(), Dataset()
    values.RescaleSlope, values.RescaleIntercept, values.RescaleType = slope, 10, "HU"
    frame.PixelValueTransformationSequence = Sequence([values])
    return frame


def _palette() -> dict[str, object]:
    levels = (np.arange(256, dtype=np.uint16) * 257).tobytes()
    parts = (("Descriptor", [256, 0, 16]), ("Data", levels))
    colours = ("Red", "Green", "Blue")
    return {f"{name}PaletteColorLookupTable{part}": value for name in colours for part, value in parts}


def nifti_examples(folder: Path) -> list[Files]:
    """A volume, one with slope and intercept, a compressed series, and two beside each other."""
    volume = np.random.default_rng(0).integers(0, 2000, (4, 3, 2, 2), dtype=np.int16)
    whole = save_nifti(folder / "x.nii", volume[..., 0]).read_bytes()
    scaled = save_nifti(folder / "x.nii", volume[..., 0].astype(np.uint8), 0.5, -3.0).read_bytes()
    series = save_nifti(folder / "x.nii.gz", volume.astype(np.float32)).read_bytes()
    return [
        {"in/a.nii": whole},
        {"in/a.nii": scaled},
        {"in/a.nii.gz": series},
        {"in/a.nii": whole, "in/sub-01_T1w.nii.gz": series},
    ]


def parquet_examples(folder: Path) -> list[Files]:
    """As on the hub, with class names; a plain column with named labels; two files of several row groups."""
    images = [encode(np.full((5, 4, 3), 40 * i, np.uint8), "PNG") for i in range(5)]
    cells = pa.array([{"bytes": image, "path": f"p{i}.png"} for i, image in enumerate(images)], type=CELLS)
    notes = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    hub = pa.table({"image": cells, "label": [0, 1, -1, None, 1]})
    hub = hub.replace_schema_metadata({"huggingface": json.dumps(notes)})
    names = pa.array(["b", "a", None, "a", "c"]).dictionary_encode()
    plain = pa.table({"picture": pa.array(images, type=pa.large_binary()), "label": names})
    first = _parquet(folder, hub, compression="none")  # damage to a page reaches its images
    other, groups = _parquet(folder, plain), _parquet(folder, hub, rows=2)
    return [
        {"in/a.parquet": first},
        {"in/a.parquet": other},
        {"in/a.parquet": groups, "in/b.parquet": first},
    ]


def _parquet(folder: Path, table: pa.Table, rows: int = 100, compression: str = "snappy") -> bytes:
    pq.write_table(table, folder / "x.parquet", row_group_size=rows, compression=compression)
    return (folder / "x.parquet").read_bytes()


def look_at_packing(folder: Path) -> str:
    """Pack a folder as the command does; what it wrote must be sound."""
    first = next(path for path in sorted((folder / "in").iterdir()))
    scans = first.suffix != ".parquet" and first.stat().st_size % 2  # half of them with a window
    command = ["pack.py", str(folder / "in"), str(folder / "out"), *(WINDOW if scans else ())]
    with patch.object(sys, "argv", command), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        pack(parse())
    faults = [str(fault) for shard in (folder / "out").glob("*.tar") for fault in verify_shard(shard)]
    assert not faults, faults
    return CORRUPT if (folder / "out" / "unreadable-train.txt").exists() else WORKED
