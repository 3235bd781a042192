"""How many operations a second a device reaches on plain matrix products: what a training step is held to."""

import time

import torch
from torch import Tensor

SIZES = {"cpu": (1024, 2048), "cuda": (4096, 8192)}  # square matrices; the device's best size varies
CALLS = {"cpu": 1, "cuda": 10}  # timed together: a single call on a GPU is over before the host looks


def matrix_ceiling(device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> float:
    """Operations per second (a multiply-add counts two) of the fastest torch.mm found in about `seconds`."""
    sizes = SIZES[device.type]
    return max(_best_rate(size, device, dtype, seconds / len(sizes)) for size in sizes)


def _best_rate(size: int, device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    calls = CALLS[device.type]
    _time(left, right, calls)  # warm-up: the first call loads and picks kernels
    end = time.perf_counter() + seconds
    times = [_time(left, right, calls)]
    while time.perf_counter() < end:
        times.append(_time(left, right, calls))
    return calls * 2 * size**3 / min(times)


def _time(left: Tensor, right: Tensor, calls: int) -> float:
    """Seconds of `calls` products, the device idle before and after."""
    _wait(left.device)
    start = time.perf_counter()
    for _ in range(calls):
        torch.mm(left, right)
    _wait(left.device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
