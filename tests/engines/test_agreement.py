"""One loss curve: single, ddp, fsdp2 and hybrid sharding at equal global batch and group size.

MLP heads with Sinkhorn, randomized heads with centring, a change or a slide from one to the other, the change
after steps with a frozen backbone, SwAV with a queue; drop path 0.3, groups with 0, 5 and 17 masked patches.
Differences are those of the order of sums.
"""

from typing import Any

import pytest
import torch

from tests.engines.curve import FROZEN, several, train
from tests.engines.processes import on_ranks
from tests.golden_files import relative_error
from tests.test_golden import key_bias_removed

HEADS = ("mlp", "rmlp", "change", "mix", "swav")
Case = dict[str, Any]
TWO: list[Case] = [
    *({"kind": kind, "head": head} for kind in ("ddp", "fsdp2") for head in HEADS),
    {"kind": "ddp", "head": "mlp", "accumulation_steps": 2},
    {"kind": "fsdp2", "head": "mlp", "accumulation_steps": 2},
    {"kind": "ddp", "head": "mlp", "activation_checkpointing": "selective"},
    {"kind": "fsdp2", "head": "mlp", "activation_checkpointing": "full"},
]
HALF: list[Case] = [{"kind": kind, "head": "mlp", "precision": "bf16"} for kind in ("ddp", "fsdp2")]
FREEZE: list[Case] = [{"kind": kind, "head": "change", "steps": FROZEN} for kind in ("ddp", "fsdp2")]
FOUR: list[Case] = [{"kind": "fsdp2", "head": head, "replicate": 2} for head in ("mlp", "rmlp")]


@pytest.fixture(scope="module")
def single() -> dict[str, Any]:
    return {head: train("single", head) for head in HEADS}


@pytest.fixture(scope="module")
def spread(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What rank 0 saw, by case."""
    folder = tmp_path_factory.mktemp("ranks")
    found = {}
    for ranks, cases in ((2, [*TWO, *HALF, *FREEZE]), (4, FOUR)):
        results = on_ranks(ranks, folder / str(ranks), several, cases)[0]
        found |= {str(case): result for case, result in zip(cases, results, strict=True)}
    return found


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for mine, reference in zip(found["losses"], expected["losses"], strict=True):
        assert mine == pytest.approx(reference, rel=1e-5)
    for mine, reference in zip(found["norms"], expected["norms"], strict=True):
        assert mine == pytest.approx(reference, rel=1e-4)
    assert found["drawn"] == expected["drawn"]
    for branch in ("student", "teacher"):
        for name, value in expected[branch].items():
            pair = (key_bias_removed(name, found[branch][name]), key_bias_removed(name, value))
            assert relative_error(*pair) < 1e-4, (branch, name)
    for name in ("teacher_cls", "features"):  # what the teacher computes, not only what it holds
        assert relative_error(found[name], expected[name]) < 1e-5, name
    for name, value in expected["centers"].items():
        assert relative_error(found["centers"][name], value) < 1e-5, name


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_accumulation_and_checkpointing_on_one_device(single: dict[str, Any], head: str, mode: str) -> None:
    found = train("single", head, accumulation_steps=2, activation_checkpointing=mode)
    assert_same(found, single[head])


@pytest.mark.dist
@pytest.mark.parametrize("case", [*TWO, *FOUR], ids=lambda case: "-".join(map(str, case.values())))
def test_several_ranks(single: dict[str, Any], spread: dict[str, Any], case: Case) -> None:
    assert_same(spread[str(case)], single[case["head"]])


def moved(found: dict[str, Any], start: dict[str, Any], branch: str) -> set[str]:
    """The parts of a branch that are not what they were, to the bit."""
    weights = found[branch].items()
    return {name.split(".")[0] for name, value in weights if not torch.equal(value, start[branch][name])}


def test_a_frozen_backbone_on_one_device(single: dict[str, Any]) -> None:
    start, frozen = (train("single", "change", steps=steps) for steps in (0, FROZEN))
    assert moved(frozen, start, "student") == moved(frozen, start, "teacher") == {"dino_head", "ibot_head"}
    assert "backbone" in moved(single["change"], start, "student") & moved(single["change"], start, "teacher")


@pytest.mark.dist
@pytest.mark.parametrize("case", FREEZE, ids=lambda case: case["kind"])
def test_a_frozen_backbone_on_several_ranks(spread: dict[str, Any], case: Case) -> None:
    found, start = spread[str(case)], train("single", "change", steps=0)
    assert moved(found, start, "student") == moved(found, start, "teacher") == {"dino_head", "ibot_head"}


@pytest.mark.dist
@pytest.mark.parametrize("case", HALF, ids=lambda case: case["kind"])
def test_half_precision_is_the_same_contract(
    single: dict[str, Any], spread: dict[str, Any], case: Case
) -> None:
    found, alone = spread[str(case)], train("single", precision="bf16")
    assert found["dtypes"] == alone["dtypes"] == ["torch.float32"]  # weights, moments, centres
    for mine, reference, exact in zip(found["losses"], alone["losses"], single["mlp"]["losses"], strict=True):
        assert mine == pytest.approx(reference, rel=0.02)
        assert mine == pytest.approx(exact, rel=0.1)
    assert found["losses"][0] == pytest.approx(alone["losses"][0], rel=1e-4)
    assert found["losses"][0] != pytest.approx(
        single["mlp"]["losses"][0], rel=1e-5
    )  # it is another precision


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch.compile warns of its own parts
@pytest.mark.parametrize("mode", ["full", pytest.param("selective", marks=pytest.mark.drill)])
def test_compiled_blocks(single: dict[str, Any], mode: str) -> None:
    found = train("single", steps=2, compile=True, activation_checkpointing=mode)
    for mine, reference in zip(found["losses"], single["mlp"]["losses"], strict=False):
        assert mine == pytest.approx(reference, rel=1e-5)


def test_the_loss_falls(single: dict[str, Any]) -> None:
    assert single["mlp"]["losses"][-1][0] < 0.8 * single["mlp"]["losses"][0][0]
