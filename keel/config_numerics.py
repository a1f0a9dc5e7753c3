"""What `numerics = "exact"` cannot be had with."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from keel.config import TrainConfig


def refuse_with_exact(config: TrainConfig, refuse: Callable[[bool, tuple[str, ...], str, str], None]) -> None:
    """Call `refuse(wrong, options, what, fix)` for each combination that exact mode does not hold for."""
    if config.numerics != "exact":
        return
    fast = 'set numerics = "fast"'
    refuse(
        config.engine.id == "vllm",
        ("numerics", "engine.id"),
        "vLLM makes its products with kernels of its own, which give other bits than the learner's even in its "
        "batch-invariant mode; and vLLM's CPU build has no such mode: its kernels need a GPU",
        fast + '; on a GPU, engine.vllm.environment = { VLLM_BATCH_INVARIANT = "1" } makes vLLM agree with itself',
    )
    refuse(
        config.engine.id not in ("embedded", "vllm"),
        ("numerics", "engine.id"),
        "exact mode is one forward pass shared by the learner and the embedded engine; another engine has its own",
        'set engine.id = "embedded", or numerics = "fast"',
    )
    refuse(
        config.learner.ranks > 1,
        ("numerics", "learner.ranks"),
        "learner ranks have fewer threads each than the engine, and the bits of a product are those of a number of "
        "threads",
        'set learner.ranks = 1, or numerics = "fast"',
    )
    refuse(
        config.learner.share_prefixes == "on",
        ("numerics", "learner.share_prefixes"),
        "exact mode computes every sequence for itself, as the engine does",
        'set learner.share_prefixes = "auto", which is off there, or numerics = "fast"',
    )
    refuse(
        config.device.startswith("cuda"),
        ("numerics", "device"),
        "what exact mode rests on was measured on the CPU only",
        'set device = "cpu", or numerics = "fast"',
    )
    for option, value in (("model.attention", config.model.attention), ("model.experts", config.model.experts)):
        refuse(
            value != "keel",
            ("numerics", option),
            "exact mode shares Keel's own attention and experts between engine and learner",
            f'set {option} = "keel"',
        )
