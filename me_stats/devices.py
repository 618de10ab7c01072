"""Arrays on their way to a device."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def on_device(array: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """`array` as a tensor on `device`; the host does not wait for what the device still has to do.

    A copy from ordinary memory would: only from page-locked memory can an accelerator fetch by itself.

    >>> on_device(np.arange(3), torch.device("cpu"))
    tensor([0, 1, 2])
    """
    tensor = array if isinstance(array, Tensor) else torch.from_numpy(array)
    if tensor.device == device or device.type == "cpu":
        return tensor.to(device)
    if not tensor.is_cpu:
        return tensor.to(device, non_blocking=True)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
