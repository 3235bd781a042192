"""Figures of diagnosed and compared models as plain values, for JSON."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from pretrain.sinder.comparison import Subject


def diagnosis_document(subject: Subject) -> dict[str, Any]:
    """Verdict, evidence and predictions of one model; directions whole."""
    found, layers = subject.diagnosis, []
    for index, direction in enumerate(subject.directions):
        facts = asdict(direction)
        facts["direction"] = direction.direction.tolist()
        seen = asdict(found.layers[index]) if found.layers else {}
        layers.append({"block": index, **facts, **seen})
    share = found.map.tolist() if found.map is not None else None
    head = {"verdict": found.verdict, "reason": found.reason, "first_block": found.first_layer}
    return {**head, "images": found.images, "map": share, "layers": layers}


def comparison_document(subjects: Sequence[Subject]) -> dict[str, Any]:
    """The same of each model, with what it has of the first one's defects; directions left out."""
    models = []
    for subject in subjects:
        document = diagnosis_document(subject)
        for layer in document["layers"]:
            del layer["direction"]
        measure = asdict(subject.measure) if subject.measure else None
        scores = asdict(subject.segmentation) if subject.segmentation else None
        added = {"against_the_first": measure, "knn_percent": subject.knn, "segmentation": scores}
        models.append({"name": subject.name, **document, **added})
    return {"models": models}
