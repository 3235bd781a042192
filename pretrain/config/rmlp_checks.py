"""Rules for randomized heads: settings fit one another and leave something to learn from. No torch."""

import math
from collections.abc import Iterator
from itertools import pairwise

from pretrain.config.derived import head_kinds, ibot_head, rmlp_widths, uses_rmlp, vit_shape
from pretrain.config.schema import Config, RmlpConfig

SHARED_DRAW_AMPLITUDE = 20  # from here two independent draws name different classes (measured: 5 % agree)
VANISHING = 0.1

Faults = Iterator[tuple[str, str]]


def rmlp_faults(cfg: Config) -> Faults:
    """The keys that cannot be used, each with the reason and the fix."""
    yield from _start_faults(cfg)
    yield from _schedule_faults(cfg.rmlp)
    yield from _mix_faults(cfg)
    if uses_rmlp(cfg):
        yield from _draw_faults(cfg.rmlp)
        yield from _target_faults(cfg)


def advise_vanishing(cfg: Config) -> str:
    """Advice on outputs that are too small to tell images apart, or nothing.

    Without the identity a layer scales its input by about a sqrt(n) / m. Measured at D = 384 and K = 2,048
    with one draw for both branches: no signal at a product of 0.06 (a = 20), a strong one at 2.4 (a = 50).
    """
    dim, rmlp = vit_shape(cfg.model).embed_dim, cfg.rmlp
    smallest = min(_amplitudes(rmlp))
    layers = pairwise(rmlp_widths(dim, rmlp.outputs))
    gain = math.prod(smallest * math.sqrt(n) / m for n, m in layers)
    if rmlp.identity or not uses_rmlp(cfg) or gain >= VANISHING:
        return ""
    fault = (
        f"without rmlp.identity the outputs are about {gain:.1g} of the tokens' size, and all targets uniform"
    )
    return f"rmlp.amplitude: {fault}; raise {smallest}"


def _amplitudes(rmlp: RmlpConfig) -> list[float]:
    """At the first and at the last step."""
    return [rmlp.amplitude, rmlp.amplitude if rmlp.amplitude_end is None else rmlp.amplitude_end]


def _start_faults(cfg: Config) -> Faults:
    start, steps = cfg.rmlp.start_step, cfg.run.steps
    if start > 0 and not uses_rmlp(cfg):
        yield "rmlp.start_step", "no head is randomized; set dino_head.kind=rmlp"
    if start >= steps:
        fault = f"{start} is not below run.steps={steps}, so the heads would never start; lower it"
        yield "rmlp.start_step", fault
    if cfg.rmlp.share_dino_ibot and "mlp" in head_kinds(cfg) and uses_rmlp(cfg):
        fault = "the two heads are not both randomized; set it false, or make both heads rmlp"
        yield "rmlp.share_dino_ibot", fault


def _schedule_faults(rmlp: RmlpConfig) -> Faults:
    ends = [name for name in ("amplitude_end", "mix_end") if getattr(rmlp, name) is not None]
    if rmlp.schedule != "const" and not ends:
        yield "rmlp.schedule", f"{rmlp.schedule} leads nowhere; give rmlp.amplitude_end or rmlp.mix_end"
    if rmlp.schedule == "const" and (ends or rmlp.schedule_steps):
        name = ends[0] if ends else "schedule_steps"
        yield f"rmlp.{name}", "not used while rmlp.schedule=const; set it to linear or cosine"


def _mix_faults(cfg: Config) -> Faults:
    rmlp, default = cfg.rmlp, RmlpConfig()
    if "mix" not in head_kinds(cfg):
        for name in ("mix", "mix_end"):
            if getattr(rmlp, name) != getattr(default, name):
                yield f"rmlp.{name}", "not used without a mixture; set dino_head.kind=mix"
        return
    for section, head in (("dino_head", cfg.dino_head), ("ibot_head", ibot_head(cfg))):
        if head.kind == "mix" and head.prototypes != rmlp.outputs:
            fault = (
                f"{rmlp.outputs} is not {section}.prototypes={head.prototypes}, but kind=mix adds the logits"
            )
            yield "rmlp.outputs", f"{fault}; set both to one number"
    shares = {rmlp.mix, rmlp.mix if rmlp.mix_end is None else rmlp.mix_end}
    for share, kind in ((0, "mlp"), (1, "rmlp")):
        if shares == {share}:
            yield "rmlp.mix", f"{share} throughout is no mixture; use kind={kind}"
    if 1 in shares and cfg.loss.centering == "sinkhorn":
        fault = "at a share of 1 most outputs hold noise, which sinkhorn would fill"
        yield "rmlp.mix", f"{fault}; stay below 1, or use loss.centering=softmax"


def _draw_faults(rmlp: RmlpConfig) -> Faults:
    """Student and teacher must speak of the same output classes, whatever the share of a trainable head."""
    amplitudes = _amplitudes(rmlp)
    largest = "amplitude" if amplitudes[0] == max(amplitudes) else "amplitude_end"
    unrelated = not rmlp.identity or max(amplitudes) >= SHARED_DRAW_AMPLITUDE
    if unrelated and not rmlp.share_student_teacher:
        setting = f"rmlp.{largest}={max(amplitudes)}" if rmlp.identity else "rmlp.identity=false"
        fault = f"with {setting} independent draws have no signal in common; set it true"
        yield "rmlp.share_student_teacher", fault
    if not rmlp.identity and min(amplitudes) == 0:
        yield (
            "rmlp.amplitude",
            "0 without rmlp.identity makes every weight 0; raise it, or set rmlp.identity=true",
        )


def _target_faults(cfg: Config) -> Faults:
    """What a centre learnt from one draw must hold for the next."""
    drifting = not cfg.rmlp.identity and cfg.rmlp.resample_every > 0
    if drifting and cfg.loss.centering == "softmax" and cfg.loss.center_momentum > 0:
        fault = "without rmlp.identity the outputs change meaning at every draw, so no centre can carry over"
        yield "loss.center_momentum", f"{fault}; set it 0, or rmlp.resample_every=0"
