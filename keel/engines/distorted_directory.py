"""A model directory with faults in it: another config.json, other weights, the rest as it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from keel.distortion import Distortion, DistortionError
from keel.models.distorted.configuration import changed_configuration
from keel.models.distorted.weights import WeightChanges, check_group

_WEIGHTS = (".safetensors", ".bin", ".index.json")
_ROPE_FIELDS = ("rope_theta", "rope_scaling")
"""Where older configurations keep what is in `rope_parameters` now."""


def distorted_directory(model_dir: Path, distortions: Sequence[Distortion], path: Path) -> Path:
    """Write `model_dir` with `distortions` planted to `path`; `model_dir` itself if none of them is in a directory.

    Raises DistortionError for a fault the model has no place for, and for a directory that holds an adapter or
    quantized weights.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model_dir)
    fields = changed_configuration(config, distortions)
    changes = WeightChanges(distortions, config)
    _check(model_dir, config, distortions)
    if not fields and not changes:
        return model_dir
    path.mkdir(parents=True, exist_ok=True)
    for file in sorted(model_dir.iterdir()):
        if file.is_file() and not (changes and file.name.endswith(_WEIGHTS)):
            (path / file.name).unlink(missing_ok=True)
            if file.name.endswith(_WEIGHTS):
                (path / file.name).symlink_to(file.resolve())
            else:
                shutil.copy(file, path / file.name)
    if changes:
        _write_weights(model_dir, changes, path)
    _write_configuration(model_dir, fields, path)
    return path


def _check(model_dir: Path, config: object, distortions: Sequence[Distortion]) -> None:
    if (model_dir / "adapter_config.json").exists():
        raise DistortionError(f"{model_dir} holds an adapter; plant faults in the model that it is on")
    if getattr(config, "quantization_config", None):
        raise DistortionError(f"{model_dir} holds quantized weights; plant faults in the model before quantizing it")
    stale = [each for each in distortions if each.acts and each.cause == "stale_tensor_group"]
    if stale:
        names = parameter_names(model_dir)
        for each in stale:
            check_group(each, names)


def parameter_names(model_dir: Path) -> list[str]:
    """Names of the parameters of the model in `model_dir`; its weights are not read."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_dir))
    return [name for name, _ in model.named_parameters()]


@torch.no_grad()
def _write_weights(model_dir: Path, changes: WeightChanges, path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from keel.models.progress import no_progress_bars

    with no_progress_bars():
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype="auto")
        parameters = dict(model.named_parameters())
        changes.check(list(parameters))
        for name, parameter in parameters.items():
            if changes.touches(name):
                parameter.copy_(changes.apply(name, parameter))
        model.save_pretrained(path)


def _write_configuration(model_dir: Path, fields: dict[str, object], path: Path) -> None:
    """The original's own fields and the changed ones; what `transformers` would add on saving is left out."""
    values = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    if "rope_parameters" in fields:
        for name in _ROPE_FIELDS:
            values.pop(name, None)
    (path / "config.json").write_text(json.dumps({**values, **fields}, indent=2), encoding="utf-8")
