"""An experiment as plain values, for JSON."""

import math
from dataclasses import asdict
from typing import Any

from pretrain.registers.experiment import Experiment
from pretrain.registers.findings import findings


def experiment_document(experiment: Experiment) -> dict[str, Any]:
    """All figures; the log norm ratio of zeros is null, as JSON has no infinity."""
    result = experiment.result
    scores = {
        task: {
            name: {
                "score": asdict(own.score),
                "difference": asdict(own.difference) if own.difference else None,
                "p_value": own.p_value,
            }
            for name, own in by_condition.items()
        }
        for task, by_condition in result.scores.items()
    }
    document = {
        "findings": [asdict(found) for found in findings(result)],
        "images": result.images,
        "classes": experiment.classes,
        "calibration_images": experiment.calibration_images,
        "left_out": [str(condition) for condition in experiment.left_out],
        "effective_rank": result.effective_rank,
        "scores": scores,
        "effects": {name: asdict(effect) for name, effect in result.effects.items()},
    }
    finite: dict[str, Any] = _finite(document)
    return finite


def _finite(value: Any) -> Any:
    match value:
        case dict():
            return {name: _finite(own) for name, own in value.items()}
        case list():
            return [_finite(own) for own in value]
        case float():
            return value if math.isfinite(value) else None
        case _:
            return value
