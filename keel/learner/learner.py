"""One process that learns: score, gradient, step. With several ranks, each runs this on its share of the batch."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from keel.algo.load_balance import Balance, expert_counts, load_metrics
from keel.batch import MicroBatch, PackedBatch
from keel.config import LearnerConfig, ModelConfig, Stage
from keel.dist.ranks import Ranks
from keel.dist.shard import shard_policy
from keel.learner import probe, state
from keel.learner.base import LearnerError, Update
from keel.learner.distorted import distort_learner
from keel.learner.gradient import Objective, update_metrics
from keel.learner.optim import MasterAdamW, learning_rate
from keel.learner.randomness import seed_random_states
from keel.learner.replay import (
    ReplayingPolicy,
    chosen_counts,
    lacks_support,
    old_streams,
    own_support_streams,
    reference_streams,
    refuse_without_support,
    sum_of,
)
from keel.learner.stats import Stats
from keel.models.adapter_files import AdapterError
from keel.models.adapter_layout import adapter_layout
from keel.models.flops import FlopCount
from keel.models.lora import base_fingerprint
from keel.models.policy import PolicyModel
from keel.sync.base import WeightSource
from keel.sync.transports import TIMEOUT_S, send_weights, write_weights
from keel.types import Verdict


class Learner:
    """A policy and its optimizer.

        learner.enter(stage)
        batch = learner.score(batch)
        update = learner.backward(batch)
        stats = learner.apply(update, verdict)

    `policy` is public so that an engine in the same process can sample from the very same parameters.
    """

    def __init__(
        self,
        model: ModelConfig,
        learner: LearnerConfig,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        ranks: Ranks | None = None,
        numerics: str = "fast",
    ) -> None:
        """Load the policy of `model` onto `device`. `seed` seeds the process's global generators.

        Raises AdapterError for an adapter that cannot be had, or one that is there without `model.lora` asking for it.
        """
        seed_random_states(seed)
        self.config = model
        self.recompute_every = learner.recompute_every
        self.missing_support = learner.missing_support
        self.device = torch.device(device)
        self.ranks = Ranks() if ranks is None else ranks
        self.policy = PolicyModel.load(
            model.path,
            dtype=model.dtype,
            attention=model.attention,
            experts=model.experts,
            gradient_checkpointing=model.gradient_checkpointing,
            head_chunk_tokens=model.head_chunk_tokens,
            head_dtype=model.head_dtype,
            trust_remote_code=model.trust_remote_code,
            revision=model.revision,
            device=self.device,
            lora=model.lora,
            numerics=numerics,
            router=model.router,
        )
        if self.policy.adapter is not None and model.lora.rank == 0:
            raise AdapterError(
                f"{model.path} holds an adapter of rank {self.policy.adapter.rank} on {self.policy.adapter.base}, and "
                "model.lora.rank is 0; set it to that rank to train the adapter on, or export the run it is from "
                "with --merged and start from that"
            )
        self.acting = ReplayingPolicy(self.policy, learner.replay_routes, learner.share_prefixes)
        """`policy` as every pass of the learner runs it."""
        self.base = base_fingerprint(self.policy.model) if self.policy.adapter is not None else ""
        """Of the weights that an adapter is on, which are in no checkpoint; "" without one."""
        self._flops = FlopCount.of(self.policy.model, self.policy.info)
        if self.ranks.mesh is not None:
            shard_policy(self.policy, _layers(self.policy), self.ranks.mesh)
        self._planting = ExitStack()
        self._planted = None
        if learner.distortions:
            self._planted = self._planting.enter_context(distort_learner(self.policy, learner.distortions))
        # Taken once: while a sharded module runs, its attributes are gathered copies.
        self._parameters = self.policy.trained_parameters()
        self.optimizer = MasterAdamW(self._parameters, self.ranks)
        self.step = 0
        self.version = 0
        self.num_skipped = 0
        self.stage: Stage | None = None
        self.reference: dict[str, torch.Tensor] | None = None  # local parts, in the parameters' own types
        self._objective: Objective | None = None
        self._serial = 0
        self._changed: dict[str, torch.Tensor] = {}  # own values of what `change_weights` changed
        self.micro_batches = 0
        """Micro-batches begun so far: grows while a long pass goes on."""

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """Parameters that are trained (of an adapter, it alone) by their names in `policy.model`; tied ones once."""
        return self._parameters

    def enter(self, stage: Stage) -> None:
        """Begin `stage`: fresh moments, fresh schedule, and, with a KL penalty, the present weights as the reference.

        The reference of an adapter is the model without it, of which there is no second copy.
        Entering the stage one is in (after a resume) keeps all three and takes over changed options. Raises
        LearnerError if `step` is not one of the stage's, PluginError for a plug-in that does not exist or options it
        does not take.
        """
        if not stage.first_step <= self.step < stage.first_step + stage.num_steps:
            raise LearnerError(
                f"stage {stage.name!r} has steps {stage.first_step} to {stage.first_step + stage.num_steps - 1}, the "
                f"learner is at step {self.step}: enter stages in order"
            )
        if stage == self.stage:
            return  # the loop enters at every step
        same = self.stage is not None and (self.stage.name, self.stage.first_step) == (stage.name, stage.first_step)
        self._objective = Objective(stage.algo)
        self.stage = stage
        if same:
            self.optimizer.configure(stage.optim)
        else:
            self.optimizer.reset(stage.optim)
            self.reference = None
        if not self._objective.needs_reference or self.policy.adapter is not None:
            self.reference = None
        elif self.reference is None:
            if same and self.step > stage.first_step:
                raise LearnerError(
                    f"stage {stage.name!r} was begun without a reference, and at step {self.step} its first weights "
                    "are gone; set algo.kl.coefficient = 0, or start the run anew"
                )
            self.reference = {name: self._local(p).clone() for name, p in self.parameters().items()}

    def score(self, batch: PackedBatch) -> PackedBatch:
        """Fill `old_logprobs` (and with it `replayed_routes`) and `ref_logprobs`, each only if the stage's algorithm
        needs it, and supports that the engine did not tell, if the learner may.

        With several ranks only this rank's micro-batches are filled. Raises LearnerError before `enter`, and for tokens
        drawn from a cut distribution of which nothing is known.
        """
        objective = self._entered()
        if any(map(lacks_support, batch.micro_batches)):
            if self.missing_support == "refuse":
                refuse_without_support(batch.micro_batches)
            batch = self._scored(batch, functools.partial(own_support_streams, self.acting))
        if objective.needs_old_logprobs:
            batch = self._scored(batch, functools.partial(old_streams, self.acting))
        if objective.needs_reference:
            with self._reference_weights():
                batch = self._scored(batch, functools.partial(reference_streams, self.acting))
        return batch

    def backward(self, batch: PackedBatch, update_index: int = 0) -> Update:
        """The gradient of update `update_index`, kept here until `apply`; what is returned describes it.

        Raises LearnerError before `enter`, ValueError if the batch lacks a stream the algorithm needs, IndexError for
        an update the batch does not have.
        """
        objective = self._entered()
        micro_batches = batch.update(update_index)
        num_tokens = batch.denominators[update_index]
        denominator = num_tokens if batch.loss_denominators is None else batch.loss_denominators[update_index]
        self._serial += 1
        self.optimizer.zero()
        stats, streams = Stats(), dict[int, dict[str, torch.Tensor]]()
        checked = self.recompute_every > 0 and self.step % self.recompute_every == 0
        self.acting.require(micro_batches)
        refuse_without_support(micro_batches)
        if num_tokens > 0:
            own = self.ranks.deal(len(micro_batches))
            balance = self._balance(micro_batches)
            for index, micro_batch in zip(own, self._share(micro_batches), strict=True):
                computed = objective.backward(
                    self.acting,
                    micro_batch,
                    denominator,
                    stats,
                    scale=self.ranks.world_size,
                    recompute=checked,
                    balance=balance,
                    idle=index is None,
                    flops=self._flops,
                )
                self.optimizer.accumulate()
                if index is not None:
                    streams[batch.update_bounds[update_index] + index] = computed
        grad_norm = self.optimizer.finish() if num_tokens > 0 else 0.0
        metrics = update_metrics(*stats.collect(self.ranks), num_tokens, recompute=checked)
        if stats.load is not None:
            metrics |= load_metrics(self.ranks.sum(stats.load).cpu())
        staleness = self._staleness(micro_batches)
        return Update(
            serial=self._serial,
            index=update_index,
            last=update_index == batch.num_updates - 1,
            loss=metrics["policy/loss"],
            grad_norm=grad_norm,
            finite=math.isfinite(grad_norm) and math.isfinite(metrics["policy/loss"]),
            num_loss_tokens=int(num_tokens),
            metrics={**batch.metrics, **metrics, "policy/grad_norm": grad_norm, "policy/staleness": staleness},
            streams=streams,
        )

    def apply(self, update: Update, verdict: Verdict) -> dict[str, float]:
        """Take the optimizer step of `update`, unless `verdict` or a non-finite gradient says not to.

        A step not taken leaves weights and moments as they are, to the bit. Returns `policy/lr`, `policy/clip_factor`
        (what the gradient was multiplied with), `policy/skipped` (0 or 1) and `policy/num_skipped` (of the run).
        Raises LearnerError if `update` is not the one `backward` returned last.
        """
        self._entered()
        assert self.stage is not None
        if update.serial != self._serial:
            raise LearnerError(
                f"apply: got update {update.serial}, the gradient here is of update {self._serial}; apply each update "
                "once, right after its backward"
            )
        lr = learning_rate(self.stage.optim, self.step - self.stage.first_step, self.stage.num_steps)
        factor = min(1.0, self.stage.optim.max_grad_norm / (update.grad_norm + 1e-6)) if update.finite else 0.0
        skipped = not (verdict.goes and update.finite)
        if not skipped and update.num_loss_tokens > 0:
            self.optimizer.step(lr, factor)
            self.version += 1
            if self._planted is not None:
                self._planted.new_version()
        self.optimizer.zero()
        self._serial += 1  # this gradient is used up
        self.num_skipped += skipped
        self.step += update.last
        return {
            "policy/lr": lr,
            "policy/clip_factor": factor,
            "policy/skipped": float(skipped),
            "policy/num_skipped": float(self.num_skipped),
        }

    def weights_to(self, source: WeightSource) -> None:
        """Leave the current weights at `source`, or send them from there; "shared" needs nothing.

        Of an adapter only the factors go, with a note of what they are factors of. Every rank must call it.
        """
        if source.kind == "shared":
            return
        weights = self._whole_weights()
        adapter = None if self.policy.adapter is None else adapter_layout(self.policy.model)
        if self.ranks.first and source.kind == "file":
            write_weights(source.location, weights, version=self.version, adapter=adapter)
        elif self.ranks.first:
            send_weights(source.location, weights, version=self.version, timeout_s=TIMEOUT_S, adapter=adapter)
        self.ranks.barrier()

    def weight_names(self) -> tuple[str, ...]:
        """Names of what `weights_to` sends."""
        return tuple(self.parameters())

    def score_tokens(self, sequences: Sequence[Sequence[int]]) -> tuple[tuple[float, ...], ...]:
        """Of each sequence of n tokens, n - 1 log-probs at temperature 1. Every rank must call it."""
        return probe.score_tokens(self, sequences)

    def change_weights(self, names: Sequence[str], change: probe.Change, seed: int) -> None:
        """Change weights until `restore_weights`: add noise, or set them to zero. Every rank must call it."""
        probe.change_weights(self, names, change, seed, self._changed)

    def restore_weights(self) -> None:
        """Undo all changes, to the bit."""
        probe.restore_weights(self, self._changed)

    def export(self, path: str | Path) -> None:
        """Write the policy as an ordinary Hugging Face directory, tokenizer included."""
        state.export(self, Path(path))

    def save(self, path: str | Path, extra: Mapping[str, Any]) -> None:
        """Write a checkpoint, `extra` (JSON values) in it; see `keel.learner.checkpoint`."""
        state.save(self, Path(path), extra)

    def load(self, path: str | Path) -> dict[str, Any]:
        """Continue from a checkpoint of any number of ranks, bit for bit; returns the `extra` it was saved with.

        Raises CheckpointError, before anything is changed, if it is damaged or of another model.
        """
        return state.load(self, Path(path))

    def resume_stage(self, stage: Stage | None) -> None:
        """Be in `stage` without beginning it: moments and reference are set by who calls."""
        self.stage = stage
        self._objective = None if stage is None else Objective(stage.algo)

    def current_stage(self) -> Stage | None:
        """`stage`, as a call."""
        return self.stage

    def close(self) -> None:
        """Faults that were planted go; there is nothing else to release in one process."""
        self._planting.close()

    def _entered(self) -> Objective:
        if self._objective is None:
            raise LearnerError("the learner is in no stage: call enter(stage) first")
        return self._objective

    def _local(self, parameter: torch.Tensor) -> torch.Tensor:
        return self.ranks.local(parameter.detach())

    def _whole_weights(self) -> dict[str, torch.Tensor]:
        return {name: self.ranks.gather(self._local(p), p.detach()) for name, p in self.parameters().items()}

    def _share(self, micro_batches: tuple[MicroBatch, ...]) -> Iterator[MicroBatch]:
        """This rank's micro-batches; where it has none left, one without loss, so that all ranks run in step."""
        for index in self.ranks.deal(len(micro_batches)):
            self.micro_batches += 1
            yield (_idle(micro_batches) if index is None else micro_batches[index]).to(self.device)

    def _balance(self, micro_batches: tuple[MicroBatch, ...]) -> Balance | None:
        """What the load-balancing loss needs to know of the whole update; None without that loss.

        Choices that are all known are counted as they lie in the batch, which every rank has. Otherwise a pass without
        gradient finds out, before the one with.
        """
        coefficient, info = self.config.router.aux_loss_coefficient, self.policy.info
        if coefficient == 0 or info.num_moe_layers == 0:
            return None
        known = [self.acting.routes_of(micro_batch) for micro_batch in micro_batches]
        if all(routes is not None and bool((routes >= 0).all()) for routes in known):
            counts = sum_of(expert_counts(routes, info.num_experts) for routes in known if routes is not None)
        else:
            own = zip(self.ranks.deal(len(micro_batches)), self._share(micro_batches), strict=True)
            counts = self.ranks.sum(
                sum_of(chosen_counts(self.acting, micro_batch) * (index is not None) for index, micro_batch in own)
            )
        num_tokens = sum(micro_batch.num_tokens for micro_batch in micro_batches)
        return Balance(coefficient, counts.to(self.device) / max(num_tokens, 1), num_tokens)

    def _scored(
        self, batch: PackedBatch, streams_of: Callable[[MicroBatch], Mapping[str, torch.Tensor]]
    ) -> PackedBatch:
        """The batch with what a pass without gradient makes of each micro-batch of this rank."""
        scored = list(batch.micro_batches)
        for update in range(batch.num_updates):
            # Dealt update by update, as training deals them.
            start = batch.update_bounds[update]
            own = batch.update(update)
            for index, micro_batch in zip(self.ranks.deal(len(own)), self._share(own), strict=True):
                with torch.no_grad():
                    streams = streams_of(micro_batch)
                if index is not None:
                    target = scored[start + index]
                    found: dict[str, Any] = {name: s.to(target.input_ids.device) for name, s in streams.items()}
                    scored[start + index] = replace(target, **found)
        return batch.with_micro_batches(scored)

    @contextmanager
    def _reference_weights(self) -> Iterator[None]:
        """In this context the policy has the reference's weights; afterwards its own again, to the bit."""
        if self.policy.adapter is not None:
            with self.policy.without_adapter():
                yield
            return
        assert self.reference is not None
        pairs = [(self._local(p), self.reference[name]) for name, p in self.parameters().items()]
        own = [local.clone() for local, _ in pairs]
        with torch.no_grad():
            torch._foreach_copy_([local for local, _ in pairs], [reference for _, reference in pairs])
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_([local for local, _ in pairs], own)

    def _staleness(self, micro_batches: tuple[MicroBatch, ...]) -> float:
        """Versions that the oldest token learned from is behind (0 if nothing was drawn)."""
        oldest = self.version
        for micro_batch in micro_batches:
            drawn = micro_batch.policy_version[micro_batch.loss_mask & (micro_batch.policy_version >= 0)]
            if drawn.numel():
                oldest = min(oldest, int(drawn.min()))
        return float(self.version - oldest)


def _layers(policy: PolicyModel) -> Iterable[nn.Module]:
    layers = getattr(policy.model.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise LearnerError(
            f"{policy.info.model_type}: its layers were not found, so it cannot be sharded; use ranks = 1"
        )
    return layers


def _idle(micro_batches: tuple[MicroBatch, ...]) -> MicroBatch:
    """The smallest micro-batch, with nothing in it to learn."""
    smallest = min(micro_batches, key=lambda micro_batch: micro_batch.num_tokens)
    return replace(smallest, loss_mask=torch.zeros_like(smallest.loss_mask))
