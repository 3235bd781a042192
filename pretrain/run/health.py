"""Plain-language warnings when the logged numbers say that a run collapses or learns nothing.

The limits are those of docs/signals.md, which shows the runs they were taken from.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Values = Mapping[str, float]

MIN_IMAGES = 8  # a micro-batch of fewer can share a prototype by chance
SETTLE = 50  # steps that a start takes beyond its warm-up, at least
LASTING = 20  # steps that something must last before the warning: a fresh centre needs as many
RECOVERED = 3  # good checks in a row after which a warning may come again


@dataclass(frozen=True)
class Rule:
    """One thing that can be wrong, and what to say about it."""

    seen: Callable[[Values], str]  # what is seen, with the numbers; empty when all is well
    advice: str  # what it usually means, and what to try
    at_once: bool = False  # at the first sight; else it has to last
    late: bool = False  # judged after the warm-up only, and over as long a time: fresh weights look the same
    across_images: bool = True  # compares images, so it needs several


@dataclass
class _Record:
    """What one rule has seen so far."""

    bad: int = 0  # checks in a row
    good: int = 0  # likewise
    since: int = 0  # step of the first bad one
    warned: bool = False


class CollapseWatch:
    """Follows the logged numbers of one session of a run and says once when something is wrong."""

    def __init__(self, warmup_steps: int, images: int) -> None:
        """Nothing seen yet.

        Args:
            warmup_steps: `optim.warmup_steps`. At first the class tokens of all images can be equal to six
                digits (LayerScale 1e-5), so the rules about them wait until twice the warm-up.
            images: in the micro-batch that the signals come from.
        """
        self.patience = max(warmup_steps, SETTLE)
        self.settled = warmup_steps + self.patience
        self.images = images
        self._records = [_Record() for _ in RULES]

    def check(self, step: int, values: Values) -> list[str]:
        """The warnings of this step, one line each; every one comes once, until its cause has gone."""
        lines = []
        for rule, record in zip(RULES, self._records, strict=True):
            if self._applies(rule, step):
                seen = rule.seen(values)
                _count(record, bool(seen), step)
                if seen and self._due(rule, record, step):
                    record.warned = True
                    lines.append(f"{seen} {rule.advice}")
        return lines

    def _applies(self, rule: Rule, step: int) -> bool:
        enough = self.images >= MIN_IMAGES or not rule.across_images
        return enough and (step >= self.settled or not rule.late)

    def _due(self, rule: Rule, record: _Record, step: int) -> bool:
        patience = self.patience if rule.late else LASTING
        lasts = record.bad > 1 and step - record.since >= patience
        return not record.warned and (lasts or rule.at_once)


def _count(record: _Record, bad: bool, step: int) -> None:
    """Take in one more check."""
    if bad and not record.bad:
        record.since = step
    record.bad, record.good = (record.bad + 1, 0) if bad else (0, record.good + 1)
    if record.good >= RECOVERED:
        record.warned = False


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
    known = values.get("signal/target_information", math.inf)
    of_patches = values.get("signal/patch_target_information", 0.0)  # a method may have none
    if not (known < 1e-4 and of_patches < 1e-3):
        return ""
    entropy, share = _number(values, "teacher_entropy"), _number(values, "teacher_entropy_share")
    return (
        f"The targets are the same for all images and patches: they hold {known:.1g} nats about the image; "
        f"teacher entropy {entropy} nats, {share} of the largest possible."
    )


def _equal_features(values: Values) -> str:
    teacher, student = (values.get(f"signal/{branch}_cosine", 0.0) for branch in ("teacher", "student"))
    # The student leads: in a start that is only slow, its tokens part long before the teacher's do.
    if not (teacher > 0.99 and student > 0.9):
        return ""
    rank = _number(values, "feature_rank")
    seen = "The class tokens of all images point in one direction"
    return f"{seen}: mean cosine {teacher:.4f} (student {student:.4f}), effective rank {rank}."


def _number(values: Values, name: str) -> str:
    return f"{values[f'signal/{name}']:.3g}" if f"signal/{name}" in values else "unknown"


RULES = (
    Rule(
        _not_finite,
        "A number overflowed, often after too high a learning rate. Lower optim.lr, lengthen "
        "optim.warmup_steps, lower optim.clip_grad_norm or try engine.precision=fp32.",
        at_once=True,
        across_images=False,
    ),
    Rule(
        _one_prototype,
        "This is collapse: the class-token loss falls and teaches nothing. Keep loss.center_momentum at 0.9 "
        "(1.0 is no centring) or use loss.centering=sinkhorn, keep loss.koleo_weight above 0, raise "
        "teacher.warmup_temp, lower optim.lr, and start again from before it.",
    ),
    Rule(
        _no_information,
        "This is collapse to the uniform target: the teacher has nothing to teach. Lower teacher.temp and "
        "teacher.warmup_temp (0.07 and 0.04), raise loss.koleo_weight, lower optim.lr.",
        late=True,
    ),
    Rule(
        _equal_features,
        "This is collapse of the features: the class token does not tell images apart. Raise "
        "loss.koleo_weight (0.1), lower optim.lr, or use loss.centering=sinkhorn; with a queue of SwAV raise "
        "method.queue_start_step, or do without.",
        late=True,
    ),
)
