"""`keel export`: a run's weights as an ordinary Hugging Face directory that needs no Keel, with a model card.

A full-weight checkpoint gives weights. One with an adapter gives the adapter, in PEFT's format, or, merged, weights of
the base with the adapter in them. Beside them lie the tokenizer, a generation config that samples and stops as the
run's episodes did, and README.md.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from keel.chat.factory import make_chat
from keel.chat.tokenizer import load_tokenizer
from keel.export_card import model_card
from keel.export_push import check_pushable, push_directory
from keel.learner.checkpoint import verify
from keel.models.adapter_files import ADAPTER_WEIGHTS, base_model, is_adapter
from keel.monitor import cells
from keel.runs import Run, load_run
from keel.types import UserFault

if TYPE_CHECKING:
    import torch

    from keel.config import ChatConfig, RolloutConfig

Kind = Literal["weights", "adapter", "merged"]
DTYPES = ("float32", "bfloat16", "float16")
_UNFINISHED = ".unfinished"
_OF_THE_ADAPTER = ("adapter_config.json", ADAPTER_WEIGHTS)


class ExportError(UserFault):
    """The export asked for cannot be had; says what, got and how to fix."""


@dataclass(frozen=True)
class Exported:
    """What was written where; `url` is the hub's address of it, if it was pushed."""

    path: Path
    kind: Kind
    checkpoint: Path
    url: str = ""

    def _repr_html_(self) -> str:
        named = {"directory": self.path, "checkpoint": self.checkpoint.name, "pushed to": self.url or None}
        return cells.facts(f"exported: {self.kind}", named)


def export_run(
    run: str | Path | Run,
    *,
    checkpoint: int | str | None = None,
    out: str | Path | None = None,
    merged: bool | None = None,
    dtype: str = "",
    push: str = "",
) -> Exported:
    """Write the weights of a run's checkpoint (the newest) to `out` (a directory below the run's).

    `merged` False asks for the adapter, True for whole weights with the adapter in them; None is what the checkpoint
    holds. `dtype` is the type of the tensors written, "" that of the run. `push` is a hub repository, `user/name`, that
    gets a copy; a new one is private. What is written appears whole or not at all.

    Raises ExportError for something that cannot be had or is there already (nothing is overwritten), RunDirectoryError
    for a run or checkpoint that does not exist, CheckpointError for a damaged one, AdapterError if the base is gone.
    """
    run = run if isinstance(run, Run) else load_run(run)
    weights = run.weights(int(checkpoint) if isinstance(checkpoint, str) and checkpoint.isdecimal() else checkpoint)
    kind = _kind(weights, merged)
    if dtype and dtype not in DTYPES:
        raise ExportError(f"dtype: got {dtype!r}; known: {', '.join(DTYPES)}")
    if push:
        check_pushable(push, base_model(weights)[0] if kind == "adapter" else "")
    target = Path(out) if out is not None else run.path / "export" / _name(weights, kind, dtype)
    verify(weights.parent)
    with _whole(target) as unfinished:
        _write_tensors(weights, unfinished, kind, dtype, run.config.model.trust_remote_code)
        _write_generation_config(unfinished, run.config.chat, run.config.rollout)
        card = model_card(run, int(weights.parent.name), kind, base_model(weights)[0])
        (unfinished / "README.md").write_text(card, encoding="utf-8")
    url = push_directory(target, push) if push else ""
    return Exported(target, kind, weights.parent, url)


def _kind(weights: Path, merged: bool | None) -> Kind:
    if not is_adapter(weights):
        if merged is False:
            raise ExportError(f"{weights} holds whole weights: the run trained no adapter; leave --adapter out")
        return "weights"
    return "merged" if merged else "adapter"


def _name(weights: Path, kind: Kind, dtype: str) -> str:
    return "-".join(part for part in (weights.parent.name, "" if kind == "weights" else kind, dtype) if part)


@contextmanager
def _whole(target: Path) -> Iterator[Path]:
    """A directory to write to that becomes `target` by a rename when the block ends well."""
    if target.exists() or target.is_symlink():
        raise ExportError(f"{target} exists, and nothing is overwritten; choose another --out, or remove it")
    unfinished = target.with_name(target.name + _UNFINISHED)
    shutil.rmtree(unfinished, ignore_errors=True)  # of an export that was killed
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        unfinished.rename(target)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _write_tensors(weights: Path, out: Path, kind: Kind, dtype: str, trust_remote_code: bool) -> None:
    """Weights or adapter, and the tokenizer; as they are where nothing is to be changed."""
    changed = _OF_THE_ADAPTER if kind == "merged" else ()
    for file in sorted(weights.iterdir()):
        is_tensors = file.name.endswith((".safetensors", ".index.json")) or file.name == "config.json"
        if file.name in changed or (is_tensors and dtype and kind != "merged"):
            continue
        shutil.copyfile(file, out / file.name)
    if kind == "merged":
        _write_merged(weights, out, dtype, trust_remote_code)
    elif dtype and kind == "adapter":
        _convert_adapter(weights, out, dtype)
    elif dtype:
        _convert_weights(weights, out, dtype, trust_remote_code)


def _write_merged(weights: Path, out: Path, dtype: str, trust_remote_code: bool) -> None:
    from keel.models.policy import PolicyModel

    wanted = _torch_type(dtype or _stored_type(weights))
    policy = PolicyModel.load(weights, dtype=wanted, trust_remote_code=trust_remote_code)
    policy.merge_adapter()
    policy.save(out)


def _convert_weights(weights: Path, out: Path, dtype: str, trust_remote_code: bool) -> None:
    from transformers import AutoModelForCausalLM

    from keel.models.progress import no_progress_bars

    with no_progress_bars():
        model = AutoModelForCausalLM.from_pretrained(
            weights, dtype=_torch_type(dtype), trust_remote_code=trust_remote_code
        )
        model.save_pretrained(out)


def _convert_adapter(weights: Path, out: Path, dtype: str) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(weights / ADAPTER_WEIGHTS)
    save_file(
        {name: tensor.to(_torch_type(dtype)) for name, tensor in tensors.items()},
        out / ADAPTER_WEIGHTS,
        metadata={"format": "pt"},
    )


def _stored_type(weights: Path) -> str:
    """The type of an adapter's tensors, which is that of the run's forward pass."""
    from safetensors import safe_open

    with safe_open(str(weights / ADAPTER_WEIGHTS), framework="pt", device="cpu") as file:
        name = next(iter(file.keys()))
        return str(file.get_tensor(name).dtype).removeprefix("torch.")


def _torch_type(dtype: str) -> torch.dtype:
    import torch

    found: torch.dtype = getattr(torch, dtype)
    return found


def _write_generation_config(out: Path, chat: ChatConfig, rollout: RolloutConfig) -> None:
    """Sampling as in the run's episodes: nothing cut from the distribution, and a stop where a reply ended."""
    from transformers import GenerationConfig

    tokenizer = load_tokenizer(out)
    sampling: dict[str, Any] = {"do_sample": False}
    if rollout.temperature > 0:
        sampling = {
            "do_sample": True,
            "temperature": rollout.temperature,
            "top_p": rollout.top_p,
            "top_k": rollout.top_k,
        }
    GenerationConfig(
        eos_token_id=list(make_chat(chat, tokenizer).stop_token_ids),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        **sampling,
    ).save_pretrained(out)
