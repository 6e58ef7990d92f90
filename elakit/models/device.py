"""Devices and the precision in which a model computes."""

from __future__ import annotations

from typing import Any

import torch

from elakit.errors import SettingError


def device_named(device: str | torch.device | None) -> torch.device:
    """Device of a given name; a `SettingError` is raised if this machine cannot use it.

    Parameters
    ----------
    device : str or torch.device, optional
        Name such as "cpu" or "cuda:1". Default: CUDA where it is available, otherwise the CPU.

    Returns
    -------
    torch.device

    Raises
    ------
    SettingError
        Raised when this machine has no such device, or the device holds no values ("meta").

    Examples
    --------
    >>> device_named("cpu")
    device(type='cpu')
    >>> device_named("gpu")
    Traceback (most recent call last):
    ...
    elakit.errors.SettingError: device='gpu' is not a device; use 'cpu', 'cuda', 'cuda:1' or 'mps', for example.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise SettingError(
            f"device={device!r} is not a device; use 'cpu', 'cuda', 'cuda:1' or 'mps', for example."
        ) from error
    if chosen.type == "meta":
        raise SettingError("device='meta' holds no values, so no image can be generated on it; use 'cpu' or 'cuda'.")
    try:
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        kind = {"cuda": "CUDA"}.get(chosen.type, chosen.type)
        which = "" if chosen.index is None else " with that index"
        raise SettingError(
            f"device={str(chosen)!r}, but this machine has no usable {kind} device{which}; use 'cpu'."
        ) from error
    return chosen


def compute_dtype(module: Any) -> torch.dtype:
    """Floating-point type in which a model computes.

    It can differ from the type in which the weights are stored: quantized weights (bitsandbytes, GGUF) are integers,
    and layerwise casting keeps weights in 8 bits until a layer runs.

    Examples
    --------
    >>> compute_dtype(torch.nn.Linear(2, 2).to(torch.bfloat16))
    torch.bfloat16
    """
    own = getattr(module, "dtype", None)  # diffusers' models know about layerwise casting
    dtypes = [own] if isinstance(own, torch.dtype) else []
    dtypes += [part.compute_dtype for part in module.modules() if _is_dtype(getattr(part, "compute_dtype", None))]
    dtypes += [weight.dtype for weight in (*module.parameters(), *module.buffers())]
    return next((dtype for dtype in dtypes if dtype.is_floating_point and dtype.itemsize >= 2), torch.float32)


def _is_dtype(value: Any) -> bool:
    return isinstance(value, torch.dtype)
