"""What must be right before DeepSpeed is imported."""

import os

import torch


def prepare_environment(device: torch.device) -> None:
    """Settle what DeepSpeed reads when it is imported: the accelerator, and the number of the device."""
    os.environ["DS_ACCELERATOR"] = device.type
    local = torch.cuda.current_device() if device.type == "cuda" else 0
    os.environ.setdefault("LOCAL_RANK", str(local))  # demanded; not set where Slurm starts the ranks
