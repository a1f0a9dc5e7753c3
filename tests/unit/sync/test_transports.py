"""Weights through a directory: bits arrive as they left, or nothing changes and the message names what is wrong."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

from keel.sync import transports
from keel.sync.base import SyncError
from keel.sync.transports import WEIGHTS_FILE, is_full, read_weights, transfer_places, weights_directory, write_weights


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(5, 3, generator=generator),
        "b.weight": torch.randn(7, generator=generator).bfloat16(),
        "c": torch.randn(4, 2, generator=generator).t(),
    }


def test_bits_names_and_version_survive(tmp_path: Path) -> None:
    sent = tensors()
    into = {name: torch.zeros_like(tensor).requires_grad_() for name, tensor in sent.items()}
    addresses = {name: tensor.data_ptr() for name, tensor in into.items()}
    write_weights(tmp_path, sent, version=12)
    assert read_weights(tmp_path, into) == 12
    for name, tensor in sent.items():
        assert torch.equal(into[name], tensor)
        assert into[name].data_ptr() == addresses[name]


def test_tied_tensors_travel_under_both_names(tmp_path: Path) -> None:
    shared = torch.randn(3, 4)
    write_weights(tmp_path, {"embed": shared, "head": shared})
    into = {"embed": torch.zeros(3, 4), "head": torch.zeros(3, 4)}
    assert read_weights(tmp_path, into) is None
    assert torch.equal(into["embed"], shared)
    assert torch.equal(into["head"], shared)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("c"), ["missing: c"]),
        (lambda t: t.update(d=torch.zeros(1)), ["unexpected: d"]),
        (lambda t: t.update(c=torch.zeros(4, 2)), ["c is torch.float32 [4, 2]", "[2, 4]"]),
        (lambda t: t.update({"b.weight": torch.zeros(7)}), ["b.weight is torch.float32 [7]", "torch.bfloat16"]),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_changes(tmp_path: Path, change: object, words: list[str]) -> None:
    into = {name: torch.full_like(tensor, 2.0) for name, tensor in tensors().items()}
    sent = tensors()
    change(sent)  # type: ignore[operator]
    write_weights(tmp_path, sent)
    with pytest.raises(SyncError) as caught:
        read_weights(tmp_path, into)
    for word in words:
        assert word in str(caught.value)
    assert all((tensor == 2.0).all() for tensor in into.values())


def test_a_place_without_weights_says_so(tmp_path: Path) -> None:
    with pytest.raises(SyncError, match=WEIGHTS_FILE):
        read_weights(tmp_path, tensors())


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = tensors()
    write_weights(tmp_path, sent, version=1)

    def half(_: object, path: str, **__: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(transports, "save_file", half)
    with pytest.raises(OSError, match="No space") as caught:
        write_weights(tmp_path, sent, version=2)
    assert is_full(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == [WEIGHTS_FILE]
    assert read_weights(tmp_path, {name: torch.zeros_like(t) for name, t in sent.items()}) == 1


def test_the_directory_of_a_transfer_is_removed(tmp_path: Path) -> None:
    with weights_directory(tmp_path) as location:
        write_weights(location, tensors())
        assert Path(location).parent == tmp_path
    assert list(tmp_path.iterdir()) == []


def test_places_are_the_one_given_or_memory_before_disk() -> None:
    assert transfer_places("here") == ["here"]
    assert transfer_places()[-1] is None
    assert not is_full(OSError(errno.EACCES, "no"))
