"""The kernel pairs there are, and which of them computes what: by name, or automatically with a reason to print.

Automatic choice takes the first that can, in the order of `BACKENDS`, where torch's own flash kernels come first: they
come with torch, and are the ones every test of a device runs. What is asked for by name is used, or refused.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from keel.ops.attention import blocks, cpu, cuda, cudnn, flash_packages, flex
from keel.ops.attention.layout import AttentionBackendError, Layout

FULL = (torch.float32, torch.float64)
HALF = (torch.bfloat16, torch.float16)
DTYPES = (*FULL, *HALF)


class PlainForward(Protocol):
    """Attention without sinks: (q, k, v, layout, scale) -> (out [T, H, D], lse [T, H]); nothing seen is (0, -inf)."""

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


class PlainBackward(Protocol):
    """Its gradients (dq, dk, dv), computed from the `out` and `lse` it is handed, not from its own."""

    def __call__(
        self,
        grad: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        layout: Layout,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: ...


@dataclass(frozen=True, slots=True)
class Backend:
    """A kernel pair, and the devices, element types and head sizes it takes; a backend never hears of sinks.

    `refuses_size` and `refuses_device` say in words why a head size or a device will not do, or None. `package` is the
    module that must be installed.
    """

    name: str
    device_types: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    forward: PlainForward
    backward: PlainBackward
    reason: str
    refuses_size: Callable[[int], str | None] | None = None
    refuses_device: Callable[[torch.device], str | None] | None = None
    package: str | None = None

    def refusal(self, device: torch.device, dtype: torch.dtype, head_size: int | None = None) -> str | None:
        """Why it cannot compute tensors of `dtype` on `device` with heads of `head_size`, or None if it can."""
        if device.type not in self.device_types or dtype not in self.dtypes:
            return f"it takes {_takes(self)}, the tensors are {dtype} on {device}"
        if self.package is not None and not _is_installed(self.package):
            return f"it needs the module {self.package!r}, which is not installed"
        refused = None if head_size is None or self.refuses_size is None else self.refuses_size(head_size)
        return refused or (None if self.refuses_device is None else self.refuses_device(device))


BACKENDS: dict[str, Backend] = {
    "cpu": Backend("cpu", ("cpu",), DTYPES, cpu.forward, cpu.backward, "torch's stock CPU flash kernel"),
    "cuda": Backend(
        "cuda",
        ("cuda",),
        HALF,
        cuda.forward,
        cuda.backward,
        "torch's stock CUDA flash kernels",
        refuses_size=cuda.refuses_size,
    ),
    "blocks": Backend(
        "blocks",
        ("cpu", "cuda"),
        FULL,
        blocks.forward,
        blocks.backward,
        "plain products by blocks of rows: the CUDA flash kernels take bfloat16 and float16 only",
    ),
    "cudnn": Backend(
        "cudnn",
        ("cuda",),
        HALF,
        cudnn.forward,
        cudnn.backward,
        "cuDNN's attention in torch, for layers without a window",
        refuses_size=cudnn.refuses_size,
    ),
    "flash_attn_2": Backend(
        "flash_attn_2",
        ("cuda",),
        HALF,
        partial(cuda.run_forward, flash_packages.forward_2),
        partial(cuda.run_backward, flash_packages.backward_2),
        "the kernels of the package flash-attn 2",
        refuses_size=cuda.refuses_size,
        package=flash_packages.MODULE_2,
    ),
    "flash_attn_3": Backend(
        "flash_attn_3",
        ("cuda",),
        HALF,
        partial(cuda.run_forward, flash_packages.forward_3),
        partial(cuda.run_backward, flash_packages.backward_3),
        "the Hopper kernels of the package flash-attn 3",
        refuses_size=cuda.refuses_size,
        refuses_device=flash_packages.needs_hopper,
        package=flash_packages.MODULE_3,
    ),
    "flex": Backend(
        "flex",
        ("cuda",),
        DTYPES,
        flex.forward,
        flex.backward,
        "torch's flex attention, compiled",
        refuses_size=flex.refuses_size,
    ),
}
REFERENCE = "reference"
"""The name of the dense float64 twin; it is not a kernel pair and runs on any device."""
OWN_SINKS = "flash_attn_4"
"""The name of a package whose kernels have a sink of their own; it is not a kernel pair but a check on ours."""
NAMES = ("auto", *BACKENDS, OWN_SINKS, REFERENCE)


def choose_backend(
    name: str | Backend, device: torch.device, dtype: torch.dtype, head_size: int | None = None
) -> Backend:
    """The backend called `name` (or `name` itself, if it is one), or with "auto" the first that takes the tensors.

    Raises AttentionBackendError if there is none, or if it does not take tensors of `dtype` on `device` with heads of
    `head_size` (not asked about if None). Nothing is tried in the place of a backend that was named.
    """
    if name == "auto":
        return _first(device, dtype, head_size)
    if isinstance(name, str) and name not in BACKENDS:
        known = ", ".join(repr(known) for known in NAMES)
        raise AttentionBackendError(f"unknown attention backend {name!r}; known: {known}")
    backend = BACKENDS[name] if isinstance(name, str) else name
    refusal = backend.refusal(device, dtype, head_size)
    if refusal is not None:
        raise AttentionBackendError(f"attention backend {backend.name!r} cannot be used: {refusal}; use 'auto'")
    return backend


def usable_backends(device: torch.device, dtype: torch.dtype, head_size: int | None = None) -> list[Backend]:
    """All that could compute such tensors here, the one of "auto" first."""
    return [backend for backend in BACKENDS.values() if backend.refusal(device, dtype, head_size) is None]


def _first(device: torch.device, dtype: torch.dtype, head_size: int | None) -> Backend:
    for backend in BACKENDS.values():
        if backend.refusal(device, dtype, head_size) is None:
            return backend
    size = "" if head_size is None else f" with heads of {head_size}"
    available = ", ".join(f"{backend.name!r} ({_takes(backend)})" for backend in BACKENDS.values())
    raise AttentionBackendError(
        f"sink attention has no backend for tensors on {device} of {dtype}{size}; available: {available}, "
        f"{REFERENCE!r} (anywhere, quadratic). Move or cast the model, or pass backend={REFERENCE!r}"
    )


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its package is not there either
        return False


def _takes(backend: Backend) -> str:
    types = ", ".join(str(dtype).removeprefix("torch.") for dtype in backend.dtypes)
    return f"{types} on {' or '.join(backend.device_types)}"
