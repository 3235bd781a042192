"""How far two sets of features are apart: measures of a shift between domains."""

import numpy as np
from scipy.linalg import qr

from pretrain.errors import InputError
from pretrain.probing.linear import predictions
from pretrain.probing.preprocessing import Floats, Ints, from_array, prepare
from pretrain.probing.solvers import Solver, fit_probes
from pretrain.seeding import numpy_stream


def proxy_a_distance(
    source: Floats, target: Floats, seed: int, strength: float = 1.0, solver: Solver | None = None
) -> float:
    """2 (1 - 2 err), err of a linear classifier of domains on held-out halves (Ben-David et al. 2006).

    About 0 where a linear map cannot tell the domains apart (below it by chance), 2 where it always can. The
    larger set is thinned to the size of the other.

    Args:
        source: (n, d).
        target: (m, d) of the same place; 4 images or more each.
        seed: of halves and thinning.
        strength: C of the classifier.
        solver: default: that of probes.

    Raises:
        InputError: there are fewer images.
    """
    number = min(len(source), len(target)) // 2
    if number < 2:
        raise InputError(f"domains: {len(source)} and {len(target)} images; halves need 4 or more of each")
    drawn = [_draw(part, 2 * number, seed, index) for index, part in enumerate((source, target))]
    train, test = (
        from_array(np.concatenate([part[half::2] for part in drawn]), "domains") for half in (0, 1)
    )
    domains: Ints = np.repeat(np.arange(2), number)
    fit_on, held_out = prepare(train, test, unit_length=False)
    ((_, probes),) = fit_probes([fit_on], domains, [strength], solver or Solver())
    error = float(np.mean(predictions(probes, held_out)[0] != domains))
    return 2 * (1 - 2 * error)


def frechet_distance(first: Floats, second: Floats) -> float:
    """Squared Frechet distance of the Gaussians of two sets: |m - m'|^2 + tr(S + S' - 2 (S S')^1/2), as FID.

    With S = R^T R and S' = R'^T R', from QR decompositions of the centred sets, the last trace is the sum of
    the singular values of R R'^T: exact for covariances of any rank, where a root of S S' is not.

    Args:
        first: (n, d), n at least 2.
        second: (m, d), m at least 2.
    """
    left, right = _root(first), _root(second)
    common = np.linalg.svd(left @ right.T, compute_uv=False).sum()
    spread = (left**2).sum() + (right**2).sum() - 2 * common
    return max(0.0, linear_mmd(first, second) + float(spread))


def linear_mmd(first: Floats, second: Floats) -> float:
    """Squared maximum mean discrepancy with the linear kernel: |m - m'|^2 of sets (n, d) and (m, d)."""
    difference = first.mean(axis=0, dtype=np.float64) - second.mean(axis=0, dtype=np.float64)
    return float(difference @ difference)


def knn_drop(source_accuracy: float, target_accuracy: float) -> float:
    """Points of k-NN accuracy that the shift costs; see `analysis/knn.py`. Both in percent."""
    return source_accuracy - target_accuracy


def _root(features: Floats) -> Floats:
    """R (r, d) with R^T R the covariance of features (n, d)."""
    centred = features - features.mean(axis=0, dtype=np.float64)
    return np.asarray(qr(centred / np.sqrt(len(features) - 1), mode="r", check_finite=False)[0])


def _draw(features: Floats, number: int, seed: int, domain: int) -> Floats:
    return features[numpy_stream(seed, "domain-halves", domain).permutation(len(features))[:number]]
