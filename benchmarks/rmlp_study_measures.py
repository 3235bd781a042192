"""What benchmarks/rmlp_study.py says of a backbone: accuracy, artifacts, attention, rank."""

import json
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pretrain.analysis.backbone import build_backbone
from pretrain.analysis.consistency import consistency
from pretrain.analysis.images import RGB
from pretrain.analysis.knn import knn_predict
from pretrain.analysis.last_blocks import LastBlocks, last_blocks
from pretrain.analysis.maps import cls_attention
from pretrain.analysis.outliers import norm_outliers
from pretrain.analysis.view import view
from pretrain.export.weights import read_weights
from pretrain.method.signals import effective_rank
from pretrain.models.vit import VisionTransformer
from pretrain.probing.linear import predictions
from pretrain.probing.preprocessing import from_array, prepare
from pretrain.probing.solvers import Solver, fit_probes
from pretrain.registers.measures import effective_rank as patch_rank
from pretrain.run.durable import write_text

SIZE, BATCH, LOOKED_AT, NEIGHBOURS = 32, 200, 400, 20
Measures = dict[str, float]  # name with unit to value


class Judge:
    """Measures of a backbone on each domain; kept beside the weights, so that nothing is measured twice."""

    def __init__(self, domains: Mapping[str, tuple[str, str]], train_images: int, test_images: int) -> None:
        """Remember what to read.

        Args:
            domains: name to patterns of labelled training and test shards.
            train_images: of each, the first ones.
            test_images: likewise.
        """
        self.domains, self.numbers = domains, (train_images, test_images)

    def __call__(self, export: Path) -> Measures:
        """Those of an export."""
        kept = export.with_suffix(".measures.json")
        if kept.exists():
            found: Measures = json.loads(kept.read_text())
            return found
        backbone = build_backbone(read_weights(export), torch.device("cpu"))
        found = {}
        for domain in self.domains:
            found |= {f"{domain}/{name}": value for name, value in self._measures(backbone, domain).items()}
        write_text(kept, json.dumps(found) + "\n")
        return found

    def _measures(self, backbone: VisionTransformer, domain: str) -> Measures:
        train, test = (
            last_blocks(backbone, self._batches(pattern, number))
            for pattern, number in zip(self.domains[domain], self.numbers, strict=True)
        )
        looked_at = self._batches(self.domains[domain][1], min(LOOKED_AT, self.numbers[1]))
        images = torch.cat([batch for batch, _ in looked_at])
        rank = float(effective_rank(test.cls[:, -1]))
        return {**accuracy(train, test), **looks(backbone, images), "feature_rank": rank}

    def _batches(self, pattern: str, number: int) -> Iterable[tuple[Tensor, Tensor]]:
        batches = RGB.labelled([pattern], "--shards", SIZE, SIZE, BATCH)
        full, rest = divmod(number, BATCH)
        yield from islice(batches, full)
        for images, labels in islice(batches, 1 if rest else 0):
            yield images[:rest], labels[:rest]


@torch.no_grad()
def accuracy(train: LastBlocks, test: LastBlocks) -> Measures:
    """k-NN of the class token, and a logistic regression on class token and mean patch (C = 1)."""
    guesses = knn_predict(train.cls[:, -1], train.labels, test.cls[:, -1], NEIGHBOURS)
    fit, held_out = prepare(*(from_array(part.features(1, True).numpy()) for part in (train, test)))
    ((_, (probe,)),) = fit_probes([fit], train.labels.numpy(), [1.0], Solver("torch"))
    right = predictions([probe], held_out)[0] == test.labels.numpy()
    return {
        "knn_percent": 100 * float((guesses == test.labels).float().mean()),
        "linear_percent": 100 * float(np.mean(right)),
    }


@torch.no_grad()
def looks(backbone: VisionTransformer, images: Tensor) -> Measures:
    """Long patches, attention of the class token in the last block, rank of an image's patches.

    Entropy is over patches, divided by its maximum; consistency is the correlation of the maps of an image
    and of moved copies, moved back (flips and crops).
    """
    seen = view(backbone, images, BATCH)
    shares = seen.attention.flatten(2)
    shares = shares / shares.sum(dim=-1, keepdim=True)
    entropy = torch.special.entr(shares).sum(dim=-1) / np.log(shares.shape[-1])
    same = consistency(lambda pixels: cls_attention(backbone, pixels), images)
    return {
        "high_norm_patches_percent": 100 * float(norm_outliers(seen.norms[:, -1]).float().mean()),
        "attention_entropy": float(entropy.mean()),
        "consistency_flip": float(same["flip"].mean()),
        "consistency_crop": float(same["crop"].mean()),
        "consistency_other_image": float(same["other image"].mean()),
        "patch_rank": float(patch_rank(seen.patches.flatten(1, 2)).mean()),
    }
