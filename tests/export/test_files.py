import struct

import pytest
import torch
from safetensors.torch import save_file

from pretrain.export.files import open_file
from tests.surgery.backbones import equal

STATE = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2)}


@pytest.mark.parametrize("first_byte", [0x80, 0x50, 0x00])
def test_a_header_may_begin_like_another_format(first_byte, tmp_path):
    """Its length comes first: 0x80 begins a pickle too, 0x50 a zip."""
    path = tmp_path / "a"
    for padding in range(0, 260):
        save_file(STATE, path, metadata={"padding": "x" * padding})
        if struct.unpack("<Q", path.read_bytes()[:8])[0] % 256 == first_byte:
            break
    assert path.read_bytes()[0] == first_byte
    assert equal(open_file(path).tensors, STATE)


@pytest.mark.parametrize("new_format", [False, True])
def test_both_formats_of_torch_are_read_and_nested_names_joined(new_format, tmp_path):
    path, nested = tmp_path / "a.bin", {"model": {"a": STATE["a"]}, "list": [STATE["b"]], "step": 3}
    torch.save(nested, path, _use_new_zipfile_serialization=new_format)
    assert equal(open_file(path).tensors, {"model.a": STATE["a"], "list.0": STATE["b"]})
