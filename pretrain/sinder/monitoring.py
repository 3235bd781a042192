"""Singular defects while a model trains: its diagnosis as it is at a step, and the figures to plot."""

from collections.abc import Sequence

from torch import Tensor

from pretrain.models.vit import VisionTransformer
from pretrain.sinder.detection import MIN_PATCHES
from pretrain.sinder.diagnosis import Diagnosis, LayerStatistics, diagnose, worst_layer
from pretrain.sinder.directions import defect_directions

BATCH_SIZE = 8  # images in a forward


def diagnose_now(backbone: VisionTransformer, images: Tensor) -> Diagnosis:
    """What `tools/sinder.py diagnose` says of a backbone's weights as they are.

    Args:
        backbone: with whole weights, on any device.
        images: (n, C, S, S') on any device.

    Raises:
        InputError: weights are not finite, so they predict no directions.
    """
    state = {name: tensor.cpu() for name, tensor in backbone.state_dict().items()}
    return diagnose(backbone, defect_directions(state, backbone.cfg), images.split(BATCH_SIZE))


def artifact_figures(layers: Sequence[LayerStatistics], patches: int) -> dict[str, float]:
    """A diagnosis as scalars, in two groups of TensorBoard: the worst block, and all blocks.

    Args:
        layers: after each block.
        patches: of an image. Below `MIN_PATCHES` there is no figure by angle; and where no patch stands out,
            there is no worst block.

    Returns:
        Shares of the patches in percent, and norms over those of the others.
    """
    worst = worst_layer(layers)
    figures = {
        "artifacts/worst_both_percent": 100 * layers[worst].by_both,
        "artifacts/worst_norm_ratio": layers[worst].norm_ratio,
    }
    if layers[worst].by_both:
        figures["artifacts/worst_block"] = worst
    for index, layer in enumerate(layers):
        of_block = _figures_of(layer, patches)
        figures |= {f"artifacts_blocks/{name}/block_{index:02d}": value for name, value in of_block.items()}
    return figures


def _figures_of(layer: LayerStatistics, patches: int) -> dict[str, float]:
    by_angle = {"by_angle_percent": 100 * layer.by_angle} if patches >= MIN_PATCHES else {}
    return {
        "both_percent": 100 * layer.by_both,
        **by_angle,
        "by_norm_percent": 100 * layer.by_norm,
        "norm_ratio": layer.norm_ratio,
    }
