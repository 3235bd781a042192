"""A trainable and a randomized head at once: logits = (1 - s) mlp + s rmlp, s the randomized one's share.

Logits are linear in both factors of a `Projection`. So the mixture is again one, of features
[(1 - s) f_mlp, s f_rmlp] and of both heads' prototypes side by side, and no target or loss knows of it.
"""

import torch

from pretrain.projection import Projection


def mix(trainable: Projection, randomized: Projection, share: float) -> Projection:
    """Features (rows, b + 2D//3) and prototypes (K, b + 2D//3) of the mixed logits.

    At share 0 and 1 the logits are those of one head, bit for bit. At 1 the trainable head still gets a
    gradient, of 0: engines that wait for every gradient need no case of their own.

    Args:
        trainable: of the MLP head, (rows, b) and (K, b).
        randomized: of the RMLP head on the same tokens, (rows, 2D//3) and (K, 2D//3).
        share: s, from 0 to 1.
    """
    if share == 0:
        return trainable
    if share == 1:
        nothing = 0 * (trainable.features.sum() + trainable.prototypes.sum())
        return Projection(randomized.features + nothing, randomized.prototypes)
    features = torch.cat([(1 - share) * trainable.features, share * randomized.features], dim=1)
    return Projection(features, torch.cat([trainable.prototypes, randomized.prototypes], dim=1))
