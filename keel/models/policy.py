"""The learner's and the embedded engine's one way into `transformers`.

`PolicyModel` is an ordinary `AutoModelForCausalLM` with Keel's attention, experts and routers put in. Its checkpoints
are ordinary Hugging Face directories. Trunk and head both run inside `forward`, so that whatever wraps the module
(FSDP2, compilation) sees one call.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import nn

from keel.models import experts as keel_experts
from keel.models import mxfp4
from keel.models.adapted import adapter_off
from keel.models.adapter_files import AdapterError, base_model
from keel.models.exact import fit_exact
from keel.models.fitted import fit_modules
from keel.models.info import ModelInfo, model_info
from keel.models.lora import Adapter, LoraOptions, merge_adapter, put_on_adapter, save_adapter
from keel.models.own_support import own_support, support_differs
from keel.models.padding import pad_rows
from keel.models.progress import no_progress_bars
from keel.models.router import (
    RouteRecorder,
    RouterOptions,
    checkpoint_contexts,
    record_routes,
    replace_routers,
    replay_for_rows,
    replay_of_rows,
    replayed,
    set_up_routers,
)
from keel.models.shared_rows import Share, SharedRows, share_rows, sharing_problem
from keel.ops.logprobs import DEFAULT_CHUNK_TOKENS, head_logits, linear_logprobs
from keel.ops.numerics import exact_numerics
from keel.ops.support import TokenSupport

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from keel.batch import MicroBatch

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,  # for exactness tests
}


Method = TypeVar("Method", bound=Callable[..., Any])


def _in_its_numerics(method: Method) -> Method:
    """A method that runs inside `exact_numerics` if its policy is exact."""

    @functools.wraps(method)
    def run(policy: PolicyModel, *args: Any, **kwargs: Any) -> Any:
        with exact_numerics() if policy.exact else nullcontext():
            return method(policy, *args, **kwargs)

    return cast(Method, run)


@dataclass(frozen=True)
class TokenOutputs:
    """What the model says about a micro-batch's rows; row t is about `labels[t]`, routes about `input_ids[t]`."""

    logprobs: torch.Tensor  # [T] float32, under softmax(logits / temperature)
    entropy: torch.Tensor | None  # [T] float32 nats, of the same distribution; detached unless asked
    values: torch.Tensor | None = None  # [T] float32, of a critic
    routes: torch.Tensor | None = None  # [T, moe layers, k] int32, the experts that ran
    own_routes: torch.Tensor | None = None  # likewise, what the routers would have chosen; see RouteRecorder
    route_margins: torch.Tensor | None = None  # [T, moe layers] float32, see RouteRecorder.margins
    router_logits: torch.Tensor | None = None  # [T, moe layers, E], with gradient
    own_support: TokenSupport | None = None  # of T labels; see `keel.models.own_support`
    support_differs: torch.Tensor | None = None  # [T] bool, the model's own cut would have left something else
    computed: torch.Tensor | None = None  # [U] int64, the rows that the layers ran on, if these were not all T


class PolicyModel(nn.Module):
    """A causal language model as tokens in, log-probs out.

    `model` is the `transformers` module, `info` its sizes, `adapter` what is known of its adapter, if it has one.
    Parameters have the compute type; float32 masters, where they differ, belong to the optimizer.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        head_chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
        gradient_checkpointing: bool = False,
    ) -> None:
        """Fit `model` in place: declared routers, packed input, checkpointing.

        Raises ValueError for an unusual head.
        """
        super().__init__()
        self.info: ModelInfo = model_info(model.config)
        self.model = model
        self.adapter: Adapter | None = None
        self.exact = False
        """Whether a token's bits depend on its own past alone; see `make_exact`."""
        self.head_chunk_tokens = head_chunk_tokens
        self.head_in_float32 = False
        """Whether the head's products are made in float32 where the model's type is narrower."""
        self.routers = replace_routers(model)  # a tuple: registered where they stand, not a second time here
        fit_modules(model)
        self._packs = _takes_packed_input(model.config._attn_implementation)
        self._mask = _packed_mask(model)
        if gradient_checkpointing:
            self.enable_gradient_checkpointing()

    @classmethod
    def load(  # noqa: PLR0913 (the options of the config's section)
        cls,
        path: str | Path,
        *,
        dtype: str | torch.dtype = "float32",
        attention: str = "keel",
        experts: str = "keel",
        gradient_checkpointing: bool = False,
        head_chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
        head_dtype: str = "model",
        trust_remote_code: bool = False,
        revision: str = "",
        device: torch.device | str | None = None,
        lora: LoraOptions | None = None,
        numerics: str = "fast",
        router: RouterOptions | None = None,
    ) -> PolicyModel:
        """Load a Hugging Face directory or hub id; the keywords are those of the config's `model` section.

        A directory with an adapter in it (PEFT's) is its base with that adapter on. `lora` of a rank above 0 puts a
        fresh one on a model that has none, and must agree with one that is there. With an adapter, the adapter alone
        can be trained.

        Returns it in evaluation mode, or in training mode if `gradient_checkpointing` asks for it (`transformers`
        checkpoints in training mode only). Raises what `transformers` raises for a path that is no model, ValueError
        for an unknown dtype or an unusual head, NotImplementedError for experts 'keel' does not know, AdapterError for
        an adapter that cannot be had, ExactNumericsError for `numerics` "exact" where that cannot be had.

        MXFP4 weights are read as `dtype`, exactly; other quantized ones are refused with a ValueError. Code that lies
        beside a model is not run unless `trust_remote_code` says so.
        """
        from transformers import AutoConfig, AutoModelForCausalLM

        _register(attention, experts)
        base, base_revision = base_model(path, revision)
        config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code, revision=base_revision or "main")
        options = mxfp4.loading_options(config)
        if model_info(config).num_experts:
            options["experts_implementation"] = experts
        with no_progress_bars():
            model = AutoModelForCausalLM.from_pretrained(
                base,
                dtype=_dtype(dtype),
                attn_implementation=attention,
                trust_remote_code=trust_remote_code,
                revision=base_revision or "main",
                **options,
            )
        if "quantization_config" in options:
            mxfp4.finish_reading(model, _dtype(dtype))
        if device is not None:
            model.to(device)
        policy = cls(model, head_chunk_tokens=head_chunk_tokens, gradient_checkpointing=gradient_checkpointing)
        policy.head_in_float32 = head_dtype == "float32"
        if experts == keel_experts.IMPLEMENTATION:
            keel_experts.check(model)
        policy.adapter = put_on_adapter(model, path, lora, revision)
        if router is not None:
            set_up_routers(policy.routers, router, policy.info.num_moe_layers)
        if numerics == "exact":
            policy.make_exact()
        return policy

    def make_exact(self) -> None:
        """Give each token bits that depend on its own past alone, here and in every engine that is made exact too.

        Raises ExactNumericsError for a model that cannot have it, or a machine whose products do not keep it.
        """
        fit_exact(self.model)
        self.exact = True

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """What learning changes, by names in `model`: with an adapter its factors, else everything; tied ones once."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def merge_adapter(self) -> None:
        """Add the adapter to the weights, in place, and forget it; `save` then writes whole weights.

        Rounded once more, to the weights' type. Raises AdapterError if there is no adapter.
        """
        if self.adapter is None:
            raise AdapterError("merge_adapter: this policy has no adapter")
        merge_adapter(self.model)
        self.adapter = None

    def without_adapter(self) -> AbstractContextManager[None]:
        """In this context (and in no other thread) the policy is its base, to the bit; there is no gradient inside.

        Raises AdapterError if it has no adapter.
        """
        if self.adapter is None:
            raise AdapterError("without_adapter: this policy has no adapter to switch off; load it with lora=")
        return adapter_off()

    def enable_gradient_checkpointing(self) -> None:
        """Recompute each layer in the backward pass; the same bits. Switches to training mode."""
        self.model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": checkpoint_contexts})
        self.train()

    @_in_its_numerics
    def forward(
        self,
        micro_batch: MicroBatch,
        *,
        with_entropy: bool = True,
        with_routes: bool = False,
        with_margins: bool = False,
        with_router_logits: bool = False,
        with_own_support: bool = False,
        with_support_check: bool = False,
        entropy_grad: bool = False,
        share_prefixes: Share = "off",
    ) -> TokenOutputs:
        """Log-probs of `micro_batch.labels` under softmax(logits / temperature), sequences kept apart; where top-p or
        top-k cut, over what the micro-batch says was left.

        `with_routes` returns each token's experts, `with_margins` also how near a tie the choice was,
        `with_router_logits` what it was made of. `with_own_support` returns every label's support, one of the model's
        own making where the micro-batch has none for a cut one; `with_support_check` compares those it has with the
        model's own cut, without gradient. Gradients flow through the entropy only if `entropy_grad`. `share_prefixes`
        computes what sequences have in common once ("auto": where it can and pays); what is said of a row stays the
        same, to rounding. A dense model has no routes (None). Raises ValueError if routes are wanted of a model whose
        routers are not declared, if the attention implementation cannot keep packed sequences apart, if prefixes must
        be shared and cannot be, or if a temperature is not positive.
        """
        if micro_batch.num_sequences > 1 and not self._packs:
            raise ValueError(
                f"model: got {micro_batch.num_sequences} packed sequences, which attention = "
                f"{self.model.config._attn_implementation!r} would let see each other; set attention = 'keel'"
            )
        rows = pad_rows(micro_batch, self._shared(micro_batch, share_prefixes))
        recorder = self._recorder(
            with_routes or with_margins or with_router_logits, with_margins=with_margins, with_logits=with_router_logits
        )
        with replay_of_rows(rows.computed):
            hidden, recorder = self._hidden(rows.input_ids, rows.positions, recorder, **rows.attention)
        rows.check_shared(self.info)
        logprobs, entropy = linear_logprobs(
            rows.for_head(hidden),
            self.head.weight,
            rows.labels,
            temperature=rows.temperature,
            bias=self.head.bias,
            support=rows.support,
            chunk_tokens=self.head_chunk_tokens,
            float32_products=self.head_in_float32,
            with_entropy=with_entropy,
            entropy_grad=entropy_grad,
        )
        outputs = TokenOutputs(
            rows.of_labels(logprobs),
            None if entropy is None else rows.of_labels(entropy),
            computed=rows.computed,
        )
        if with_own_support or with_support_check:
            cut = (rows.of_inputs(hidden), self.head, micro_batch, self.head_chunk_tokens, self.head_in_float32)
            outputs = replace(
                outputs,
                own_support=own_support(*cut) if with_own_support else None,
                support_differs=support_differs(*cut) if with_support_check else None,
            )
        if recorder is None:
            return outputs
        return replace(
            outputs,
            routes=rows.of_inputs(recorder.routes()),
            own_routes=rows.of_inputs(recorder.own_routes()),
            route_margins=rows.of_inputs(recorder.margins()) if with_margins else None,
            router_logits=rows.of_inputs(recorder.logits()) if with_router_logits else None,
        )

    def sharing_problem(self) -> str:
        """Why what sequences have in common cannot be computed once; "" if it can."""
        if self.exact:
            return "numerics = 'exact' computes every sequence for itself, as the engine does"
        return sharing_problem(self.model, self.info)

    def _shared(self, micro_batch: MicroBatch, share: Share) -> SharedRows | None:
        """What of `micro_batch` is computed once; None: everything is computed. Raises ValueError if "on" cannot be."""
        if share == "off":
            return None
        if problem := self.sharing_problem():
            if share == "on":
                raise ValueError(f"share_prefixes = 'on': {problem}; or set it to 'auto'")
            return None
        return share_rows(micro_batch, replayed(), share)

    @_in_its_numerics
    def trunk(
        self, input_ids: torch.Tensor, positions: torch.Tensor, *, with_routes: bool = False, **attention_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Last hidden states `[T, Hd]` (after the final norm) and routes `[T, moe layers, k]` int32 or None.

        `attention_kwargs` reach the registered attention function (`keel_cache=`, or `cu_seq_lens_q=` and its kin).
        """
        hidden, recorder = self._hidden(input_ids, positions, self._recorder(with_routes), **attention_kwargs)
        return hidden, None if recorder is None else recorder.routes()

    @_in_its_numerics
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The head: `[T, Hd]` -> `[T, V]`, float32 (float64 stays float64), before any temperature."""
        return head_logits(hidden, self.head.weight, self.head.bias, float32_products=self.head_in_float32)

    @property
    def head(self) -> nn.Linear:
        """The output projection; shares its weight with the embedding where they are tied."""
        return self.model.get_output_embeddings()  # type: ignore[no-any-return]

    def save(
        self, path: str | Path, tokenizer: Any = None, *, state_dict: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        """Write an ordinary Hugging Face directory that plain `AutoModelForCausalLM` loads.

        With an adapter, what is written is the adapter, as PEFT does it, which names its base. `state_dict` (names of
        `self.model`) stands in for the module's own weights, for callers whose weights are sharded. `tokenizer` is
        saved beside them if given.
        """
        options = mxfp4.saving_options(self.model)
        if state_dict is not None:
            options["state_dict"] = dict(state_dict)
        with no_progress_bars():
            if self.adapter is None:
                self.model.save_pretrained(path, **options)
            else:
                save_adapter(self.model, self.adapter, path, state_dict)
        if tokenizer is not None:
            tokenizer.save_pretrained(path)

    def _recorder(self, wanted: bool, *, with_margins: bool = False, with_logits: bool = False) -> RouteRecorder | None:
        """A recorder, if one is wanted and there is anything to record. Raises ValueError for unknown routers."""
        if not wanted or self.info.num_moe_layers == 0:
            return None
        if self.info.num_moe_layers != len(self.routers):
            raise ValueError(
                f"routes: {self.info.model_type} has {self.info.num_moe_layers} MoE layers, of which "
                f"{len(self.routers)} have a router Keel can record; do not ask for its routes"
            )
        return RouteRecorder(len(self.routers), with_margins=with_margins, with_logits=with_logits)

    def _hidden(
        self, input_ids: torch.Tensor, positions: torch.Tensor, recorder: RouteRecorder | None, **attention_kwargs: Any
    ) -> tuple[torch.Tensor, RouteRecorder | None]:
        arguments = {
            "input_ids": input_ids[None],
            "position_ids": positions[None],
            "attention_mask": self._mask,
            "use_cache": False,
            **attention_kwargs,
        }
        recording = nullcontext() if recorder is None else record_routes(recorder)
        with recording, replay_for_rows(input_ids.shape[0]):
            return self.model.base_model(**arguments).last_hidden_state[0], recorder


def _takes_packed_input(attention: str) -> bool:
    """Whether `cu_seq_lens_q` is honoured; transformers' eager and sdpa paths take it and ignore it."""
    return attention == "keel" or "flash" in attention


def _packed_mask(model: PreTrainedModel) -> dict[str, None] | None:
    """What to hand a model as `attention_mask` for packed input.

    Models with several kinds of layers take a dict with a mask for each and then make none themselves; with Keel's
    attention, `cu_seq_lens_q` says all there is to say. Others get None and let the attention's mask function decide.
    """
    if model.config._attn_implementation != "keel":
        return None
    source = inspect.getsource(inspect.unwrap(type(model.base_model).forward))
    if "attention_mask, dict)" not in source:
        return None
    kinds = getattr(model.config, "layer_types", None) or ()
    return dict.fromkeys({"full_attention", "sliding_attention", *kinds})


def _register(attention: str, experts: str) -> None:
    if attention == "keel":
        from keel.models import attention as keel_attention

        keel_attention.register()
    if experts == keel_experts.IMPLEMENTATION:
        keel_experts.register()


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype!r}; known: {', '.join(DTYPES)}")
    return DTYPES[dtype]
