from dataclasses import replace

import pytest
import torch

from pretrain.errors import InputError
from pretrain.export import read_export, write_export
from pretrain.surgery.architecture import check_complete
from pretrain.surgery.combine import average, cast, ema_weights
from pretrain.surgery.registers import add_registers, drop_registers
from tests.surgery.backbones import GIANT, PLAIN, REGISTERS, equal, features, images_for, random_state


@pytest.mark.parametrize("model", [PLAIN, REGISTERS], ids=["none before", "four before"])
def test_registers_added_and_dropped_leave_the_model_as_it_was(model):
    state, before = random_state(model), model.num_register_tokens
    more, section = add_registers(state, model, 3)
    check_complete(more, section)
    assert section.num_register_tokens == before + 3
    added = more["register_tokens"][:, before:]
    assert 0 < added.std() < 2e-6 and len(added[0].unique(dim=0)) == 3
    assert features(more, section, images_for(model)).isfinite().all()
    back, again = drop_registers(more, section, keep=before)
    assert equal(back, state) and again == model


def test_registers_are_drawn_by_their_seed():
    state = random_state(PLAIN)
    one, two, other = (add_registers(state, PLAIN, 4, seed)[0]["register_tokens"] for seed in (0, 0, 1))
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_dropping_all_registers_leaves_a_model_without():
    state, model = drop_registers(random_state(GIANT), GIANT)
    check_complete(state, model)
    assert model == replace(GIANT, num_register_tokens=0)
    for wrong in ({"keep": 4}, {"keep": -1}):
        with pytest.raises(InputError, match=r"the model has 4 registers, --keep .* drops none"):
            drop_registers(random_state(GIANT), GIANT, **wrong)
    with pytest.raises(InputError, match="add-registers: 0 must be from 1 to 1024"):
        add_registers(state, model, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.1, 0.7, 3.0], ema_weights(3, 0.9)], ids=str)
def test_the_average_of_identical_weights_is_identical(weights, dtype):
    state = {name: tensor.to(dtype) for name, tensor in random_state(PLAIN).items()}
    assert equal(average([state] * 3, weights), state)


def test_averages_are_those_of_their_formulas():
    states = [random_state(PLAIN, seed) for seed in range(3)]
    mean, ema = average(states, [1, 2, 1]), average(states, ema_weights(3, 0.75))
    for name in mean:
        a, b, c = (state[name].double() for state in states)
        assert torch.equal(mean[name], ((a + 2 * b + c) / 4).float())
        torch.testing.assert_close(ema[name], (0.75 * (0.75 * a + 0.25 * b) + 0.25 * c).float())


def test_wrong_averages_are_refused(tmp_path, surgery):
    paths = [tmp_path / f"{name}.safetensors" for name in "abc"]
    for path, model in zip(paths, (PLAIN, PLAIN, REGISTERS), strict=True):
        write_export(path, random_state(model), model, {})
    out = tmp_path / "out.safetensors"
    for arguments, words in (
        (paths, f"{paths[2]}: another model than {paths[0]}: embed_dim: 384 and 128; num_heads"),
        ([*paths[:2], "--weights", "1,2,3"], "--weights: 3 weights for 2 files; give one a file"),
        ([*paths[:2], "--weights", "1,-1"], "--weights: all must be 0 or more, and one above 0"),
        ([*paths[:2], "--weights", "1,x"], "'1,x' is not a list of numbers like 1,2,1"),
        ([*paths[:2], "--ema", "1.5"], "--ema: 1.5 must be between 0 and 1"),
    ):
        done = surgery("average", *arguments, "--out", out)
        assert done.status == 2 and words in done.err and done.err.count("\n") == 1
        assert not out.exists()


def test_the_average_over_a_runs_exports_by_the_tool(tmp_path, surgery):
    paths = [tmp_path / f"teacher_step_{step:08d}.safetensors" for step in (10, 20, 30)]
    states = [random_state(PLAIN, seed) for seed in range(3)]
    for step, path, state in zip((10, 20, 30), paths, states, strict=True):
        write_export(path, state, PLAIN, {"step": step})
    out = tmp_path / "out.safetensors"
    assert surgery("average", *paths, "--ema", 0.5, "--out", out).status == 0
    export = read_export(out)
    assert equal(export.state, average(states, [0.25, 0.25, 0.5]))
    done = surgery("average", *reversed(paths), "--ema", 0.5, "--out", tmp_path / "wrong.safetensors")
    assert done.status == 2 and "the oldest file comes first, these are of the steps [30, 20, 10]" in done.err
    assert [s["path"] for s in export.about["provenance"][0]["sources"]] == list(map(str, paths))


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_a_cast_and_back_loses_only_what_it_must(kind, tmp_path, surgery):
    state = random_state(PLAIN)
    source = write_export(tmp_path / "a.safetensors", state, PLAIN, {})
    small, back = tmp_path / "b.safetensors", tmp_path / "c.safetensors"
    assert surgery("cast", source, "--to", kind, "--out", small).status == 0
    assert surgery("cast", small, "--to", "float32", "--out", back).status == 0
    dtype = getattr(torch, kind)
    assert equal(read_export(small).state, {name: tensor.to(dtype) for name, tensor in state.items()})
    assert equal(read_export(back).state, {name: tensor.to(dtype).float() for name, tensor in state.items()})
    assert small.stat().st_size < 0.51 * source.stat().st_size


def test_a_value_that_does_not_fit_is_refused():
    state = random_state(PLAIN)
    state["blocks.1.mlp.fc1.weight"][3, 4] = 70000.0
    with pytest.raises(
        InputError, match=r"blocks\.1\.mlp\.fc1\.weight: its largest value 7e\+04 does not fit float16"
    ):
        cast(state, torch.float16)
    assert cast(state, torch.bfloat16)["blocks.1.mlp.fc1.weight"][3, 4] > 69000
