"""The calls that Keel makes into vLLM's workers (`/collective_rpc`, texts as arguments, a dict as answer).

    keel_describe()                           what the model is, and whether its weights can be written
    keel_load_file(location)                  weights from a safetensors file that the workers can read
    keel_load_broadcast(address)              weights from a group that the learner opens (see `channel`)

Every answer has `problem`, "" if all went well; `broken` says that the model was left mixed (the next whole push mends
that). An answer instead of an exception, because vLLM turns an exception into a page about something else.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from . import native
from .adapter import BaseWeights, check_entries, merged
from .channel import Address, Receiver
from .install import install
from .plan import Plan, WeightsRefusedError, make_plan

if TYPE_CHECKING:
    from torch import nn

WEIGHTS_FILE = "weights.safetensors"
TIMEOUT_S = 300.0
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

logger = logging.getLogger("vllm.keel")

native.register()


class WorkerExtension:
    """Mixed into vLLM's worker class: `self` is the worker."""

    vllm_config: Any
    model_runner: Any

    def keel_describe(self) -> dict[str, Any]:
        """Model type, dtype, quantization, ranks, and why weights cannot be written, if they cannot."""

        def described() -> dict[str, Any]:
            plan = _plan(self)
            return {"tensors": len(plan.targets)}

        model_config = self.vllm_config.model_config
        return {
            "model_type": model_config.hf_text_config.model_type,
            "model": str(model_config.model),
            "dtype": str(model_config.dtype).removeprefix("torch."),
            "quantization": model_config.quantization,
            "ranks": self.vllm_config.parallel_config.world_size,
            **_answered(described),
        }

    def keel_load_file(self, location: str) -> dict[str, Any]:
        """Write the weights in directory `location`: the whole model's, or an adapter's factors."""

        def load() -> dict[str, Any]:
            path = Path(location) / WEIGHTS_FILE
            if not path.is_file():
                raise WeightsRefusedError(f"no {WEIGHTS_FILE} in {location}: do server and learner share a machine?")
            with safe_open(str(path), framework="pt", device="cpu") as file:
                header = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                found = {name: (_DTYPES.get(s.get_dtype()), tuple(s.get_shape())) for name, s in slices.items()}
                return _write(self, found, header, file.get_tensor)

        return _answered(load)

    def keel_load_broadcast(self, address: str) -> dict[str, Any]:
        """Receive the weights that the learner broadcasts at `address`, then write them."""

        def load() -> dict[str, Any]:
            own = Receiver(Address.from_text(address), self.vllm_config.parallel_config.rank + 1, TIMEOUT_S)
            try:
                refuse_misfits(self, own.tensors, own.header)
            except WeightsRefusedError as error:
                own.refuse(str(error))
                raise
            tensors = own.receive()
            return _write(self, own.tensors, own.header, tensors.__getitem__)

        return _answered(load)


def refuse_misfits(worker: Any, found: Mapping[str, Any], header: Mapping[str, Any]) -> Plan:
    """The worker's plan, if `found` fits it. Raises WeightsRefusedError, with nothing changed, if not."""
    plan = _plan(worker)
    entries = header.get("adapter")
    if entries is None:
        plan.check(found)
    else:
        check_entries(entries, found, plan)
    return plan


def _write(
    worker: Any, found: Mapping[str, Any], header: Mapping[str, Any], fetch: Callable[[str], torch.Tensor]
) -> dict[str, Any]:
    plan = refuse_misfits(worker, found, header)
    names, source = set(plan.targets), fetch
    entries = header.get("adapter")
    if entries is not None:
        base = BaseWeights(worker.vllm_config.model_config)
        names = {entry["weight"] for entry in entries}
        siblings = {name for targets in plan.modules(names).values() for name in targets}
        for name in sorted(siblings):
            base.get(name, plan)  # whatever is missing is told before anything is written
        by_weight = {entry["weight"]: entry for entry in entries}

        def source(name: str) -> torch.Tensor:
            whole = base.get(name, plan)
            if name not in by_weight:
                return whole
            entry = by_weight[name]
            factors = {entry[end]: fetch(entry[end]) for end in ("down", "up")}
            return merged([entry], factors, lambda _: whole)[name]

    try:
        written = write_model(worker, plan, names, source)
    except Exception as error:  # told to the learner: the model is neither old nor new
        logger.exception("Keel: weights were written in part")
        return {"problem": f"{type(error).__name__}: {error}", "broken": True}
    return {"written": written}


def write_model(worker: Any, plan: Plan, names: set[str], source: Callable[[str], torch.Tensor]) -> int:
    """Write, under vLLM's own config context, as its loaders expect it."""
    from vllm.config import set_current_vllm_config

    with set_current_vllm_config(worker.vllm_config):
        written = install(worker.model_runner.get_model(), plan, names, source)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return written


def _plan(worker: Any) -> Plan:
    """Made once: the model's modules stay the same."""
    plan: Plan | None = getattr(worker, "_keel_plan", None)
    if plan is None:
        model: nn.Module = worker.model_runner.get_model()
        plan = worker._keel_plan = make_plan(model, worker.vllm_config)
    return plan


def _answered(call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return {"problem": "", "broken": False, **call()}
    except Exception as error:  # the border to vLLM: the learner raises it again, in its own words
        if not isinstance(error, WeightsRefusedError):
            logger.exception("Keel: a call failed")
        return {"problem": f"{error}" or type(error).__name__, "broken": False}
