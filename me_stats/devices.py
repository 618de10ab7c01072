"""Precisions by name, and arrays on their way to a device."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def torch_dtype(name: str) -> torch.dtype:
    """The precision called `name`; ValueError with the known names for another."""
    if name not in DTYPES:
        raise ValueError(f"dtype must be one of {sorted(DTYPES)}, got {name!r}")
    return DTYPES[name]


def device_fault(device: str) -> str | None:
    """Why there is no device of this name, in a line; None if there is one.

    >>> device_fault("cpu")
    """
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        return str(error).splitlines()[0]
    return None


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
