"""Plain-language warnings when the logged numbers say that a run collapses or learns nothing.

The limits are those of docs/signals.md, which shows the runs they were taken from.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Values = Mapping[str, float]

MIN_IMAGES = 8  # a micro-batch of fewer can share a prototype by chance
SETTLE = 50  # steps that a start takes beyond its warm-up, at least
RECOVERED = 3  # good checks in a row after which a warning may come again


@dataclass(frozen=True)
class Rule:
    """One thing that can be wrong, and what to say about it."""

    seen: Callable[[Values], str]  # what is seen, with the numbers; empty when all is well
    advice: str  # what it usually means, and what to try
    patience: int = 1  # bad checks in a row before the warning
    late: bool = False  # judge only after the warm-up: fresh weights look the same
    across_images: bool = True  # compares images, so it needs several


@dataclass
class _Record:
    """What one rule has seen so far."""

    bad: int = 0  # in a row
    good: int = 0  # in a row
    warned: bool = False


class CollapseWatch:
    """Follows the logged numbers of one session of a run and says once when something is wrong."""

    def __init__(self, warmup_steps: int, images: int) -> None:
        """Nothing seen yet.

        Args:
            warmup_steps: `optim.warmup_steps`. Class tokens of all images are equal to six digits at first
                (LayerScale 1e-5), so what compares them waits until twice the warm-up.
            images: in the micro-batch that the signals come from.
        """
        self.settled = warmup_steps + max(warmup_steps, SETTLE)
        self.images = images
        self._records = [_Record() for _ in RULES]

    def check(self, step: int, values: Values) -> list[str]:
        """The warnings of this step, one line each; every one comes once, until its cause has gone."""
        lines = []
        for rule, record in zip(RULES, self._records, strict=True):
            if not self._applies(rule, step):
                continue
            seen = rule.seen(values)
            if _follow(record, bool(seen), rule.patience):
                lines.append(f"{seen} {rule.advice}")
        return lines

    def _applies(self, rule: Rule, step: int) -> bool:
        enough = self.images >= MIN_IMAGES or not rule.across_images
        return enough and (step >= self.settled or not rule.late)


def _follow(record: _Record, bad: bool, patience: int) -> bool:
    """Count one more check; whether it is time to warn."""
    record.bad, record.good = (record.bad + 1, 0) if bad else (0, record.good + 1)
    if record.good >= RECOVERED:
        record.warned = False
    if record.warned or record.bad < patience:
        return False
    record.warned = True
    return True


def _not_finite(values: Values) -> str:
    names = [name for name, value in values.items() if not math.isfinite(value)]
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"{', '.join(names[:4])}{more} not finite." if names else ""


def _one_prototype(values: Values) -> str:
    used = values.get("signal/prototypes_used", math.inf)
    if not 0 < used < 1.5:
        return ""
    entropy, cosine = _number(values, "teacher_entropy"), _number(values, "teacher_cosine")
    return (
        f"The targets of all images lie on one prototype: {used:.2f} prototypes in use, teacher entropy "
        f"{entropy} nats, mean cosine of class tokens {cosine}."
    )


def _no_information(values: Values) -> str:
    known, of_patches = (values.get(f"signal/{kind}target_information", math.inf) for kind in ("", "patch_"))
    if not max(known, of_patches) < 1e-4:
        return ""
    entropy, share = _number(values, "teacher_entropy"), _number(values, "teacher_entropy_share")
    return (
        f"The targets are the same for all images and patches: they hold {known:.0e} nats about the image; "
        f"teacher entropy {entropy} nats, {share} of the largest possible."
    )


def _equal_features(values: Values) -> str:
    cosine = values.get("signal/teacher_cosine", 0.0)
    if not cosine > 0.99:
        return ""
    rank = _number(values, "feature_rank")
    return f"The class tokens of all images point one way: mean cosine {cosine:.4f}, effective rank {rank}."


def _number(values: Values, name: str) -> str:
    return f"{values[f'signal/{name}']:.3g}" if f"signal/{name}" in values else "unknown"


RULES = (
    Rule(
        _not_finite,
        "A number overflowed, often after too high a learning rate. Lower optim.lr, lengthen "
        "optim.warmup_steps, lower optim.clip_grad_norm or try engine.precision=fp32.",
        across_images=False,
    ),
    Rule(
        _one_prototype,
        "This is collapse: the class-token loss falls and teaches nothing. Keep loss.center_momentum at 0.9 "
        "(1.0 is no centring) or use loss.centering=sinkhorn, keep loss.koleo_weight above 0, raise "
        "teacher.warmup_temp, lower optim.lr, and start again from before it.",
        patience=2,
    ),
    Rule(
        _no_information,
        "This is collapse to the uniform target: the teacher has nothing to teach. Lower teacher.temp and "
        "teacher.warmup_temp (0.07 and 0.04), raise loss.koleo_weight, lower optim.lr.",
        patience=5,
        late=True,
    ),
    Rule(
        _equal_features,
        "This is collapse of the features: the class token no longer tells images apart. Raise "
        "loss.koleo_weight (0.1), lower optim.lr, or use loss.centering=sinkhorn.",
        patience=3,
        late=True,
    ),
)
