from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from pretrain import distributed, dry_run
from pretrain.config.schema import Config, HeadConfig, RmlpConfig, SourceConfig
from pretrain.data.synthetic import noise_batch
from pretrain.dry_run import Trainer, Trial, _refusal, _shards_line, _sizes
from pretrain.dry_run_table import choice_rows
from pretrain.errors import InputError
from pretrain.export import write_export
from pretrain.export.transform import Order, convert
from pretrain.run.fastest_setting import Choice, Estimate
from pretrain.run.footprint import footprint
from pretrain.run.profiling import PhaseTimer
from pretrain.train import train_step
from tests.small import small_config

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def quick_ceiling(monkeypatch):
    """10 GFLOP/s, without measuring."""
    monkeypatch.setattr(dry_run, "matrix_ceiling", lambda device, dtype: 1e10)


def table(output: str) -> dict[str, str]:
    """Rows of the printed table; the lines before it are under ""."""
    lines, _, rows = output.partition("\n\n")
    return {"": lines, **dict(row.split("  ", 1) for row in rows.splitlines())}


def run(cfg: Config, capsys) -> dict[str, str]:
    capsys.readouterr()
    assert dry_run.dry_run(cfg) == 0
    return {name: text.strip() for name, text in table(capsys.readouterr().out).items()}


def test_it_reads_nothing_writes_nothing_and_projects(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cfg = small_config(model=replace(small_config().model, init_from="no/such.safetensors"))
    rows = run(cfg, capsys)
    assert list(tmp_path.iterdir()) == []
    assert "no/such.safetensors does not exist; random weights" in rows[""]
    assert "data.shards: no shard matches data/train-*.tar" in rows[""]
    assert rows["measured"] == "1 x 8 images a step; the recipe has 1 x 8"
    assert rows["the recipe"].startswith("20 steps: 0 d 0 h")
    assert "reading and augmenting images" in rows["not included"]


def test_shards_of_several_sources_are_looked_for(tmp_path):
    (tmp_path / "a.tar").touch()
    sources = [
        SourceConfig([f"{tmp_path}/a.tar", "https://host/b.tar"]),
        SourceConfig([f"{tmp_path}/c-*.tar"]),
    ]
    data = replace(small_config().data, shards=[], sources=sources[:1])
    line = "data.sources.0.shards: 1 shards exist, 1 are remote (not looked at); noise takes their place here"
    assert _shards_line(small_config(data=data)) == line
    line = _shards_line(small_config(data=replace(data, sources=sources)))
    assert line.startswith(f"data.sources.1.shards: no shard matches {tmp_path}/c-*.tar; noise takes")


def test_the_share_is_work_times_rate_over_ceiling(capsys):
    rows = run(small_config(), capsys)
    rate = float(rows["the recipe's step"].split(": ")[1].split()[0].replace(",", ""))
    work = 1e12 * float(rows["useful work"].split()[0])
    assert float(rows["share of ceiling"].split()[0]) == pytest.approx(
        100 * work * rate / 1e10, rel=0.02, abs=0.1
    )


def test_it_says_what_exists_and_checks_it(tmp_path, capsys):
    cfg = small_config()
    backbone = Trainer(cfg, CPU, 4).engine.full_state_dict("teacher")
    weights = {k.removeprefix("backbone."): v for k, v in backbone.items() if k.startswith("backbone.")}
    export = tmp_path / "hugging_face"
    convert(write_export(tmp_path / "e.safetensors", weights, cfg.model, {}), "huggingface", Order(export))
    shard = tmp_path / "train-0.tar"
    shard.touch()
    cfg = replace(cfg, model=replace(cfg.model, init_from=str(export)))
    cfg = replace(cfg, data=replace(cfg.data, shards=[str(shard)]))
    rows = run(cfg, capsys)
    assert f"model.init_from: {export} exists" in rows[""]
    assert "Hugging Face): 35 of 35 tensors; positions 4 x 4 (" in rows[""]
    assert "data.shards: 1 shards exist" in rows[""]
    with pytest.raises(InputError, match="holds another model"):
        dry_run.dry_run(replace(cfg, model=replace(cfg.model, depth=3)))


def test_a_state_that_cannot_fit_is_refused_before_anything_is_built(monkeypatch):
    monkeypatch.setattr(distributed, "free_memory", lambda device: 2**20)
    monkeypatch.setattr(dry_run, "build_branches", None)
    with pytest.raises(
        InputError, match=r"^model.arch=vit_giant2: .* take 2\d\.\d GiB, 1 MiB are free"
    ) as caught:
        dry_run.dry_run(replace(Config(), model=replace(Config().model, arch="vit_giant2")))
    assert "\n" not in str(caught.value)


def test_a_step_that_takes_too_long_is_replaced_and_said_so(monkeypatch, capsys):
    monkeypatch.setattr(dry_run, "MAX_SECONDS", 0.0)
    cfg = small_config()
    rows = run(replace(cfg, engine=replace(cfg.engine, accumulation_steps=2)), capsys)
    assert rows["measured"].startswith("2 x 2 images a step; the recipe has 2 x 4 (4 would take about")
    assert rows["the recipe's step"].startswith("8 images in")


def test_a_micro_batch_that_would_not_fit_is_not_tried():
    cfg = small_config(optim=replace(small_config().optim, global_batch_size=1024))
    phases = {"draw": 1.0, "optimizer": 1.0}
    trial = Trial(2, 1, phases, 0.5, 120 * 2**20, base=100 * 2**20, activations=50 * 2**20, peak=0)
    assert trial.bytes(8) == 300 * 2**20
    assert trial.bytes(0) == 120 * 2**20  # gradients, once the activations are gone
    need = (300 * 2**20 + (1024 - 8) * 3 * (2 * 32**2 + 3 * 16**2)) / 2**20  # MiB; 3 bytes a pixel
    refusal = _refusal(cfg, trial, 8, free=int(need * 2**20))
    assert refusal.startswith(f"8 would take about {need:.0f} MiB, {need:.0f} MiB are free: raise")
    whole_group = replace(cfg, data=replace(cfg.data, group_size=8))
    assert "raise" not in _refusal(whole_group, trial, 8, free=2**20)
    assert _refusal(cfg, trial, 8, free=int(need / 0.9 * 2**20) + 1) == ""


def test_what_comes_once_a_step_is_not_multiplied():
    phases = {"draw": 1.0, "teacher": 2.0, "forward": 2.0, "backward": 4.0, "optimizer": 3.0}
    trial = Trial(4, 1, phases, per_image=2.0, state=0, base=0, activations=0, peak=0)
    assert trial.seconds(4) == sum(phases.values())
    assert trial.seconds(400) == 4 + 800


def test_sizes_start_small_but_with_a_mask():
    cfg = small_config(data=replace(small_config().data, group_size=16))
    assert _sizes(replace(cfg, optim=replace(cfg.optim, global_batch_size=64))) == [2, 16, 64]
    rarely = replace(cfg, mask=replace(cfg.mask, probability=0.1))
    assert _sizes(replace(rarely, optim=replace(cfg.optim, global_batch_size=16))) == [5, 16]


@pytest.mark.parametrize("heads", ["mlp", "rmlp", "mix"])
def test_the_footprint_is_what_the_engine_holds(heads):
    shared = heads == "mix"
    rmlp = RmlpConfig(outputs=40, share_student_teacher=shared, share_dino_ibot=shared)
    cfg = small_config(dino_head=HeadConfig(heads, prototypes=40), rmlp=rmlp)
    trainer, expected = Trainer(cfg, CPU, 4), footprint(cfg)
    trainer.step(0, [noise_batch(cfg, 4).normalize(torch.zeros(3), torch.ones(3))], PhaseTimer(CPU))
    student, teacher = trainer.engine.branches.values()
    assert sum(p.numel() for p in student.backbone.parameters()) == expected.backbone
    tensors = [p for branch in (student, teacher) for p in branch.parameters()]
    tensors += [torch.empty_like(p) for p in student.parameters()]  # gradients
    tensors += [t for s in trainer.engine.optimizer.state.values() for t in s.values() if t.dim()]
    drawn = [w for b in (student, teacher) for head in b.rmlp.values() for w in head.weights]
    drawn = list({w.data_ptr(): w for w in drawn}.values())
    assert sum(t.nbytes for t in [*tensors, *drawn]) == expected.total
    assert sum(w.numel() for w in drawn) == expected.drawn


def test_the_steps_are_those_of_training():
    cfg = small_config()
    batches = [noise_batch(cfg, 4, i * 4).normalize(torch.zeros(3), torch.ones(3)) for i in range(2)]
    mine, theirs = Trainer(cfg, CPU, 4), Trainer(cfg, CPU, 4)
    run = SimpleNamespace(cfg=cfg, engine=theirs.engine, method=theirs.method)
    losses = []
    for number in range(3):
        losses.append(mine.step(number, batches, PhaseTimer(CPU)))
        train_step(run, number, theirs.schedules.at(number), batches, PhaseTimer(CPU))
    assert losses[2] != losses[0]
    expected = theirs.engine.state_dict()
    for part, named in mine.engine.state_dict().items():
        assert all(torch.equal(value, expected[part][name]) for name, value in named.items())


def test_it_names_the_fastest_setting_that_fits(capsys):
    cfg = small_config()
    full = replace(cfg, engine=replace(cfg.engine, activation_checkpointing="full"))
    rows = run(full, capsys)
    assert rows["fits"].startswith("engine.activation_checkpointing=")
    assert "of 6 by estimate" in rows["fits"] and "(estimated peak " in rows["fits"]
    assert "images in a forward and full, on one device; counted: " in rows["estimated from"]
    other = replace(cfg, engine=replace(cfg.engine, kind="deepspeed"))
    rows = run(other, capsys)
    assert "of 2 by estimate" in rows["fits"]
    assert "left out because of engine.kind=deepspeed" in rows["estimated from"]


def test_it_says_what_to_lower_and_what_the_recipe_would_take():
    own = Estimate("none", 1, 40 * 2**30, 1.0)
    best = Estimate("selective", 2, 21 * 2**30, 1.2)
    trial = Trial(8, 1, {"draw": 0.0, "optimizer": 0.0}, 1.0, 0, 0, 0, 0)

    def fits(chosen):
        rows = dict(choice_rows(small_config(), Choice(chosen, own, best, 6), [trial], 24 * 2**30))
        return rows["fits"]

    assert fits(best) == (
        "engine.activation_checkpointing=selective engine.accumulation_steps=2 "
        "(estimated peak 21.0 GiB of 24.0 GiB free); fastest of 6 by estimate; "
        "the recipe's own, engine.activation_checkpointing=none "
        "engine.accumulation_steps=1, would take about 40.0 GiB"
    )
    assert fits(own).endswith("free): the recipe's own, the fastest of 6 by estimate")
    assert fits(None).startswith("none of 6 by estimate: engine.activation_checkpointing=selective ")
    assert "are free; lower data.group_size, data.local_crops.number" in fits(None)
