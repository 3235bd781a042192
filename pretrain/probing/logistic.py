"""Multinomial logistic regression of many probes at once: L-BFGS that starts from the loss's own curvature.

The curvature of the loss along a backbone's features spans many powers of ten, and plain L-BFGS takes
hundreds of steps. Here its first metric is, for each probe and each strength C, M = C X^T diag(v) X + I with
v_i = (1 - sum_k p_ik^2) / (K - 1), the mean curvature of image i over the classes at the starting point:
exact at W = 0, and the history corrects the rest.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.probing.chunks import Resident, Streamed
from pretrain.probing.history import History, dot, moved

DECREASE = 1e-4  # share of the predicted decrease that a step must bring (Armijo)
NOISE = 10  # rounding errors by which the objective may seem to rise
PATIENCE = 300  # evaluations without a smaller gap after which rounding is what is left
STATE = (  # tensors of a descent, of which each probe has a row; directions and slopes are computed anew
    *("weights", "metric", "strength", "loss", "loss_gradient", "value", "gradient"),
    *("length", "iterations", "waited", "best"),
)


class Solution(NamedTuple):
    """One probe at one strength."""

    weights: Tensor  # (K, D), the last column the intercepts
    objective: float
    gradient: float  # largest entry
    iterations: int
    converged: bool


def solve(
    chunks: Resident | Streamed,
    classes: int,
    strengths: Sequence[float],
    tolerance: float,
    max_iterations: int,
) -> list[list[Solution]]:
    """Minimise C * sum of losses + 0.5 |W|^2 for each probe and each C; intercepts are not penalised.

    Each probe starts from 0 at its first C, from its last solution at the next, and goes on at its own pace;
    one that is done leaves the batch. With two classes |W|^2 counts twice, which is the problem that
    scikit-learn solves with one column of weights.

    Args:
        chunks: features (P, b, D) of all n images, their content is overwritten, and labels (b,) below K.
        classes: K, at least 2.
        strengths: C, best ascending.
        tolerance: estimated distance to the minimum, over the objective.
        max_iterations: for each C.

    Returns:
        For each probe its solutions, in the order of the strengths.
    """
    descent = _Descent(chunks, classes, strengths, tolerance, max_iterations)
    while descent.probes:
        descent.step()
    return descent.solutions


def memory(rows: int, channels: int, classes: int, itemsize: int) -> tuple[int, int]:
    """Bytes that `solve` takes beside features: for each probe, and once however many there are.

    Args:
        rows: of a chunk.
        channels: D, with the ones.
        classes: K.
        itemsize: bytes of a number.
    """
    weights = channels * classes
    probe = 4 * rows * classes + channels**2 + (2 * History.SIZE + 20) * weights
    return itemsize * probe, itemsize * rows * channels + 3 * 8 * channels**2


class _Descent:
    """The probes that are not done: the first axis of every tensor."""

    def __init__(
        self,
        chunks: Resident | Streamed,
        classes: int,
        strengths: Sequence[float],
        tolerance: float,
        max_iterations: int,
    ) -> None:
        self.chunks, self.classes = chunks, classes
        self.strengths, self.tolerance, self.max_iterations = strengths, tolerance, max_iterations
        number, channels = chunks.probes, chunks.channels
        self.solutions: list[list[Solution]] = [[] for _ in range(number)]
        self.probes = list(range(number))  # which ones they are
        self.weights = torch.zeros(number, classes, channels, dtype=chunks.dtype, device=chunks.device)
        self.penalty = self.weights.new_full((channels,), 2.0 if classes == 2 else 1.0)
        self.penalty[-1] = 0
        self.history = History(self.weights)
        self.metric = self.weights.new_empty(number, channels, channels)  # inverse Cholesky factor of M
        self.strength = torch.full((number,), strengths[0], dtype=torch.float64, device=chunks.device)
        self.loss, self.loss_gradient = self._loss(self.weights)
        self.value, self.gradient = self._objective(self.weights, self.loss, self.loss_gradient)
        self.length = torch.ones_like(self.value)
        self.iterations, self.waited = (torch.zeros_like(self.value) for _ in range(2))
        self.best = torch.full_like(self.value, torch.inf)  # smallest gap so far
        for index in range(number):
            self._begin(index)
        self._turn()

    def step(self) -> None:
        """Evaluate once for each probe: a step where it decreases the objective, else a shorter try."""
        change = self.length.to(self.weights.dtype).view(-1, 1, 1) * self.direction
        trial = self.weights + change
        loss, loss_gradient = self._loss(trial)
        value, gradient = self._objective(trial, loss, loss_gradient)
        noise = NOISE * torch.finfo(trial.dtype).eps * self.value.abs()
        better = value <= self.value + DECREASE * self.length * self.slope + noise
        self.history.push(better, change, gradient - self.gradient)
        self._shorten(better, value)
        rows = better.view(-1, 1, 1)
        self.loss, self.value = torch.where(better, loss, self.loss), torch.where(better, value, self.value)
        self.weights = torch.where(rows, trial, self.weights)
        self.gradient = torch.where(rows, gradient, self.gradient)
        self.loss_gradient = torch.where(rows, loss_gradient, self.loss_gradient)
        self.iterations += better
        self._turn()
        self._finish()

    def _loss(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of losses (P,) in fp64, and their gradients (P, K, D)."""
        loss = torch.zeros(len(weights), dtype=torch.float64, device=weights.device)
        gradient = torch.zeros_like(weights)
        for features, targets in self.chunks:
            log = torch.bmm(features, weights.transpose(1, 2)).log_softmax(dim=2)
            labels = targets.view(1, -1, 1).expand(len(log), -1, 1)
            loss -= log.gather(2, labels).sum(dim=(1, 2), dtype=torch.float64)
            errors = log.exp_().scatter_add_(2, labels, -log.new_ones(labels.shape))
            gradient.baddbmm_(errors.transpose(1, 2), features)
        return loss, gradient

    def _objective(self, weights: Tensor, loss: Tensor, loss_gradient: Tensor) -> tuple[Tensor, Tensor]:
        pull = self.penalty * weights
        value = self.strength * loss + 0.5 * (pull * weights).sum(dim=(1, 2), dtype=torch.float64)
        return value, self.strength.to(weights.dtype).view(-1, 1, 1) * loss_gradient + pull

    def _shorten(self, better: Tensor, value: Tensor) -> None:
        """Back to length 1 after a step; else to the minimum of the parabola, 0.1 to 0.5 of the length."""
        rise = value - self.value - self.length * self.slope
        parabola = -0.5 * self.slope * self.length**2 / rise
        shorter = torch.minimum(torch.maximum(parabola.nan_to_num(0), 0.1 * self.length), 0.5 * self.length)
        self.length = torch.where(better, 1.0, shorter)

    def _turn(self) -> None:
        """Directions, the objective's slopes along them, and the gaps to the minima that these predict."""

        def solve_metric(vectors: Tensor) -> Tensor:
            return torch.bmm(torch.bmm(vectors, self.metric.transpose(1, 2)), self.metric)

        self.direction = -self.history.apply(self.gradient, solve_metric)
        self.slope = dot(self.direction, self.gradient).double()
        self.gap = -0.5 * self.slope / self.value

    def _finish(self) -> None:
        """Write down the solutions that are good enough, go on to the next strength."""
        improved = self.gap < 0.9 * self.best
        self.best = torch.where(improved, self.gap, self.best)
        self.waited = torch.where(improved, 0.0, self.waited + 1)
        over = (self.iterations >= self.max_iterations) | (self.waited >= PATIENCE)
        finished = ((self.gap <= self.tolerance) | over).nonzero()[:, 0].tolist()
        if not finished:
            return
        for index in finished:
            done = self.solutions[self.probes[index]]
            done.append(self._solution(index))
            if len(done) < len(self.strengths):
                self.strength[index] = self.strengths[len(done)]
                self._begin(index)
        self._drop([i for i in finished if len(self.solutions[self.probes[i]]) == len(self.strengths)])
        self._turn()

    def _solution(self, index: int) -> Solution:
        return Solution(
            self.weights[index].clone(),
            float(self.value[index]),
            float(self.gradient[index].abs().max()),
            int(self.iterations[index]),
            bool(self.gap[index] <= self.tolerance),
        )

    def _begin(self, index: int) -> None:
        """Another strength, the same weights: objective, gradient, metric and history of one probe."""
        one = slice(index, index + 1)
        strength, pull = float(self.strength[index]), self.penalty * self.weights[index]
        self.value[index] = strength * self.loss[index] + 0.5 * (pull * self.weights[index]).sum()
        self.gradient[index] = strength * self.loss_gradient[index] + pull
        self.iterations[one], self.waited[one], self.best[one], self.length[one] = 0, 0, torch.inf, 1
        self.history.clear(index)
        self.metric[index] = self._metric(index, strength)

    def _metric(self, index: int, strength: float) -> Tensor:
        """The inverse of the Cholesky factor of M (D, D): M^-1 = it^T it, which rounding keeps positive."""
        weights = self.weights[index]
        whole = weights.new_zeros(self.metric.shape[1:], dtype=torch.float64)
        for rows, _ in self.chunks:
            features = rows[index]
            probabilities = (features @ weights.T).softmax(dim=1)
            curvature = (1 - probabilities.square().sum(dim=1, keepdim=True)) / (self.classes - 1)
            whole += strength * ((features * curvature).T @ features)
        diagonal = whole.diagonal()
        diagonal += self.penalty
        extra = torch.finfo(weights.dtype).eps * whole.trace()
        factor, failed = torch.linalg.cholesky_ex(whole)
        while failed:  # the smallest eigenvalues are below the rounding of the sums
            diagonal += extra
            extra = 10 * extra
            factor, failed = torch.linalg.cholesky_ex(whole)
        torch.eye(len(whole), out=whole)  # in place: of wide features there is no room for others
        torch.linalg.solve_triangular(factor, whole, upper=False, out=whole)
        return whole.to(weights.dtype)

    def _drop(self, done: Sequence[int]) -> None:
        """Take probes out of the batch; the last ones move to their places."""
        number = len(self.probes) - len(done)
        last = [index for index in range(number, len(self.probes)) if index not in done]
        moves = list(zip([index for index in done if index < number], last, strict=True))
        for hole, index in moves:
            self.probes[hole] = self.probes[index]
        del self.probes[number:]
        for name in STATE:
            setattr(self, name, moved(getattr(self, name), moves, number))
        self.chunks.drop(moves, number)
        self.history.move(moves, number)
