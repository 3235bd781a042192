"""Weights with a test-time register: formats that cannot hold it, changes that keep it, sections that lie."""

from dataclasses import replace

import pytest
import torch

from pretrain.errors import InputError
from pretrain.export import read_export, write_export
from pretrain.export.weights import read_weights
from tests.surgery.backbones import GIANT, PLAIN, place, random_state

NEURONS = [[0, 3], [1, 40]]


@pytest.fixture
def sources(tmp_path):
    """A backbone with the register, and the same weights without."""
    state, folder = random_state(PLAIN), tmp_path / "sources"
    folder.mkdir()
    sections = (replace(PLAIN, register_neurons=NEURONS), PLAIN)
    return [
        write_export(folder / f"{name}.safetensors", state, section, {})
        for name, section in zip(("with", "without"), sections, strict=True)
    ]


@pytest.mark.parametrize("target", ["dinov2", "dinov2-chunked", "huggingface", "timm"])
def test_other_formats_lose_it_and_say_so(target, sources, surgery, tmp_path):
    out, chunks = place(tmp_path, target), ("--chunks", 2) if target == "dinov2-chunked" else ()
    command = ("convert", sources[0], "--to", target, "--out", out, *chunks)
    done = surgery(*command)
    assert done.status == 2 and done.err.count("\n") == 1 and not out.exists()
    assert "would be lost: the test-time register and its 2 neurons (other programs know none" in done.err
    assert surgery(*command, "--allow-loss").status == 0
    assert read_weights(out).model.register_neurons == NEURONS  # by our description


def test_what_reshapes_or_casts_keeps_it(sources, surgery, tmp_path):
    for index, (verb, *arguments) in enumerate(
        (
            ("convert", "--to", "ours"),
            ("interpolate", "--image-size", "84"),
            ("resize-patch", "--patch-size", "16"),
            ("channels", "--to", "1"),
            ("add-registers", "2"),
            ("cast", "--to", "bfloat16"),
        )
    ):
        out = tmp_path / f"{index}.safetensors"
        assert surgery(verb, sources[0], *arguments, "--out", out).status == 0
        assert read_export(out).model.register_neurons == NEURONS
    done = surgery("cast", sources[0], "--to", "bfloat16", "--out", tmp_path / "a.pth")
    assert done.status == 2 and "would be lost: the test-time register" in done.err
    assert not (tmp_path / "a.pth").exists()


def test_averages_are_of_equal_registers(sources, surgery, tmp_path):
    out, other = tmp_path / "out.safetensors", tmp_path / "other.pth"
    assert surgery("average", sources[0], sources[0], "--out", out).status == 0
    assert read_export(out).model.register_neurons == NEURONS
    done = surgery("average", *sources, "--out", tmp_path / "b.safetensors")
    assert done.status == 2 and "register_neurons: [[0, 3], [1, 40]] and []" in done.err
    done = surgery("average", sources[0], sources[0], "--out", other)
    assert done.status == 2 and "would be lost: the test-time register" in done.err and not other.exists()
    assert surgery("average", sources[0], sources[0], "--out", other, "--allow-loss").status == 0


def test_looks_show_it_and_compare_tokens_that_both_have(sources, surgery):
    done = surgery("inspect", sources[0], "--no-spectral")
    assert "0 registers, a test-time register of 2 neurons in blocks [0, 1], LayerScale" in done.out
    assert "test-time" not in surgery("inspect", sources[1], "--no-spectral").out
    done = surgery("diff", *sources)
    assert done.status == 1 and "architecture: register_neurons: [[0, 3], [1, 40]] and []" in done.out
    assert surgery("diff", sources[0], sources[0]).status == 0
    done = surgery("verify", *sources)
    assert done.status == 1 and "not the same within" in done.out


@pytest.mark.parametrize("model", [PLAIN, GIANT], ids=["mlp", "swiglu"])
def test_sections_that_lie_are_refused(model, tmp_path):
    state = {"w": torch.zeros(1)}
    hidden = 1536 if model is PLAIN else 344
    for neurons, words in (
        ([[model.depth, 0]], f"[{model.depth}, 0] is no pair of a block from 0 to {model.depth - 1} and"),
        ([[0, hidden]], f"[0, {hidden}] is no pair of a block from 0 to {model.depth - 1} and a hidden unit"),
        ([[-1, 0]], f"and a hidden unit from 0 to {hidden - 1}"),
        ([[0, 1, 2]], "[0, 1, 2] is no pair of a block"),
        ([[0, 1], [1, 1], [0, 1]], "[0, 1] is there more than once"),
        ([["a", 1]], "does not fit this version"),
        ([0, 1], "does not fit this version"),
    ):
        path = write_export(tmp_path / "a.safetensors", state, replace(model, register_neurons=neurons), {})
        with pytest.raises(InputError) as caught:
            read_export(path)
        assert words in str(caught.value) and "\n" not in str(caught.value)
    good = write_export(
        tmp_path / "b.safetensors", state, replace(model, register_neurons=[[0, hidden - 1]]), {}
    )
    assert read_export(good).model.register_neurons == [[0, hidden - 1]]
