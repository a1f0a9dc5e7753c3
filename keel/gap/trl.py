"""What a `GRPOTrainer` of TRL knows of the gap, written down: a mixin, and the function it calls.

    from trl import GRPOTrainer
    from keel.gap.trl import CaptureGap

    class Trainer(CaptureGap, GRPOTrainer):        # the mixin first
        gap_directory = "gap"

and then `keel mismatch gap --model DIR` (or without --model, where TRL scored the batch itself).

Read from TRL 1.16.0 (trl/trainer/grpo_trainer.py). `_generate_and_score_completions` returns a dict of tensors, of
which `prompt_ids` and `prompt_mask` [B, P] (padded left), `completion_ids` and `completion_mask` [B, C] (padded right)
and, with tools or an environment, `tool_mask` [B, C] (0 where the world wrote) are taken; `sampling_per_token_logps`
[B, C] is there if vLLM sampled (`use_vllm=True`), `old_per_token_logps` [B, C] if the trainer scored the batch, which
it does with `vllm_importance_sampling_correction=True` (its default) or where a batch outlives an optimizer step. TRL
divides logits by its `temperature` on both sides. Tokens that vLLM gave no log-prob (NaN) are left out, as TRL leaves
them out.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from keel.gap.log import ENGINE, LEARNER, GapLogError

__all__ = ["CaptureGap", "captured", "write_capture"]

_NEEDED = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")


class CaptureGap:
    """A mixin for `GRPOTrainer`: writes each generated training batch to `gap_directory`, one file a rank."""

    gap_directory: str = "gap"

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        outputs: dict[str, Any] = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        trainer: Any = self
        if trainer.model.training:
            step, rank = int(trainer.state.global_step), int(trainer.accelerator.process_index)
            written = vars(self).setdefault("_gap_written", {})
            written[step] = written.get(step, -1) + 1  # a step may generate several times
            name = f"step_{step:06d}_{written[step]:02d}_rank_{rank}.safetensors"
            write_capture(Path(self.gap_directory) / name, outputs, temperature=float(trainer.temperature))
        return outputs


def write_capture(path: Path, outputs: Mapping[str, Any], *, temperature: float = 1.0) -> None:
    """Write what `captured` makes of a batch to a safetensors file, which `keel mismatch` reads. Raises GapLogError."""
    import safetensors.torch

    from keel.files import write_whole

    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, safetensors.torch.save(captured(outputs, temperature=temperature)))


def captured(outputs: Mapping[str, Any], *, temperature: float = 1.0) -> dict[str, torch.Tensor]:
    """The arrays of `keel.gap.arrays` from what TRL's `_generate_and_score_completions` returned, padding taken out.

    Prompts are kept, so that either side can be recomputed. Raises GapLogError if it has neither side's log-probs.
    """
    missing = [name for name in _NEEDED if name not in outputs]
    if missing:
        raise GapLogError(f"TRL's batch has no {', '.join(missing)}; this mixin reads TRL 1.16")
    engine, learner = outputs.get("sampling_per_token_logps"), outputs.get("old_per_token_logps")
    if engine is None and learner is None:
        raise GapLogError(
            "TRL's batch has log-probs of neither side: sample with use_vllm=True, and leave "
            "vllm_importance_sampling_correction=True, so that the trainer scores what vLLM drew"
        )
    prompt, completion = outputs["prompt_mask"].bool().cpu(), outputs["completion_mask"].bool().cpu()
    kept = torch.cat([prompt, completion], dim=1)  # [B, P + C]
    drawn = completion if outputs.get("tool_mask") is None else completion & outputs["tool_mask"].bool().cpu()
    if engine is not None:
        drawn = drawn & ~engine.isnan().cpu()
    before = torch.zeros(prompt.shape)
    sides = {ENGINE: engine, LEARNER: learner}
    streams = {"token_ids": torch.cat([outputs["prompt_ids"].cpu(), outputs["completion_ids"].cpu()], dim=1).long()}
    streams["drawn"] = torch.cat([torch.zeros_like(prompt), drawn], dim=1)
    streams |= {
        name: torch.cat([before, torch.where(drawn, side.detach().float().cpu(), 0.0)], dim=1)
        for name, side in sides.items()
        if side is not None
    }
    streams["temperature"] = torch.full(kept.shape, temperature)
    lengths = kept.sum(1).cumsum(0)
    return {
        **{name: stream[kept].contiguous() for name, stream in streams.items()},
        "cu_seqlens": torch.cat([lengths.new_zeros(1), lengths]),
    }
