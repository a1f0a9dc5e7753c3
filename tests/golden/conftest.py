"""The part of GPT-OSS's vocabulary that the goldens need, as a tokenizer with the real ids."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).parent


def _printable_bytes() -> dict[int, str]:
    """The byte-level alphabet: printable Latin-1 stands for itself, other bytes for characters from 256 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [value for value in range(256) if value not in plain]
    return {value: chr(value) for value in plain} | {value: chr(256 + place) for place, value in enumerate(others)}


@pytest.fixture(scope="session")
def published_tokenizer() -> PreTrainedTokenizerFast:
    subset = json.loads((HERE / "o200k_subset.json").read_text(encoding="utf-8"))
    alphabet = _printable_bytes()

    def spelled(token: str) -> str:
        return "".join(alphabet[value] for value in base64.b64decode(token))

    vocabulary = {spelled(token): rank for token, rank in subset["bytes"].items()}
    merges = []
    for left, right, rank in subset["merges"]:
        merges.append((spelled(left), spelled(right)))
        vocabulary[spelled(left) + spelled(right)] = rank
    backend = Tokenizer(models.BPE(vocab={**vocabulary, **subset["special"]}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(subset["pattern"]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(subset["special"]))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|return|>")
