"""What `tools/pack.py` packs, one file per kind of input: images, tars, parquet, DICOM, NIfTI."""
