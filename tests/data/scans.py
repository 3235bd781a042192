"""Small DICOM and NIfTI files, as scanners write them."""

import gzip
from pathlib import Path

import nibabel
import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

SERIES = generate_uid(entropy_srcs=["series"])  # the same in every process


def dicom(pixels: np.ndarray, frames: int = 1, **elements: object) -> Dataset:
    """A CT slice, or frames of one, of 16 bits; elements replace or add (None takes away)."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID = CTImageStorage, generate_uid(entropy_srcs=["image"])
    dataset.SeriesInstanceUID, dataset.PatientID, dataset.Modality = SERIES, "Doe^1957", "CT"
    dataset.Rows, dataset.Columns = pixels.shape[1:3] if frames > 1 else pixels.shape[:2]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 8 * pixels.dtype.itemsize
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    if frames > 1:
        dataset.NumberOfFrames = frames
    dataset.PixelData = pixels.tobytes()
    for name, value in elements.items():
        if value is None:
            delattr(dataset, name)
        else:
            setattr(dataset, name, value)
    return dataset


def save_dicom(path: Path, dataset: Dataset) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    dataset.save_as(path, enforce_file_format=True)
    return path


def save_nifti(path: Path, values: np.ndarray, slope: float = 1.0, intercept: float = 0.0) -> Path:
    """Stored values as they are, with the slope and intercept in the header."""
    path.parent.mkdir(exist_ok=True, parents=True)
    image = nibabel.Nifti1Image(values, np.eye(4))
    nibabel.save(image, path)
    content = bytearray(gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes())
    content[112:120] = np.array([slope, intercept], "<f4").tobytes()  # scl_slope, scl_inter
    path.write_bytes(gzip.compress(bytes(content), mtime=0) if path.suffix == ".gz" else bytes(content))
    return path
