"""A run whose engine gives its keys and values back while the learner learns, against one whose engine keeps them."""

from __future__ import annotations

import json

from keel.build import Parts
from keel.engines.embedded.cache import SlotCache
from keel.loop import train

MEASURED = ("_s", "_mib", "/mfu")


def rows_and_weights(run_dir):
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    timeless = [{name: value for name, value in row.items() if not name.endswith(MEASURED)} for row in rows]
    (weights,) = (run_dir / "checkpoints").glob("*/weights/model.safetensors")
    return [row for row in rows if row["kind"] != "worst_tokens"], timeless, weights.read_bytes()


def test_freeing_changes_no_bit_of_a_run(tmp_path, make_config, warm_weights, monkeypatch):
    path = warm_weights()  # before anything is counted: it may have to be made
    held_while_learning, caches = [], []
    allocate, make_room = SlotCache.allocate.__func__, Parts.make_room

    def allocated(kind, *given, **named):
        caches.append(allocate(kind, *given, **named))
        return caches[-1]

    def made_room(parts):
        make_room(parts)
        held_while_learning.append(caches[-1].is_held)

    monkeypatch.setattr(SlotCache, "allocate", classmethod(allocated))
    monkeypatch.setattr(Parts, "make_room", made_room)
    found = []
    for free_cache in ("on", "off"):
        config = make_config(
            tmp_path / free_cache,
            model={"path": path},
            engine={"free_cache": free_cache, "slots": 8},
            rollout={"groups_per_step": 1},
            warm_start={"steps": 1, "demonstrations_per_step": 2},
            steps=2,
        )
        train(config)
        found.append(rows_and_weights(tmp_path / free_cache))
    (rows, freed, weights), (_, kept, expected_weights) = found
    assert freed == kept
    assert weights == expected_weights
    assert held_while_learning == [False] * 3 + [True] * 3
    assert [row["memory/key_values_mib"] for row in rows] == [caches[0].num_bytes / 2**20] * 3
    assert all(row["memory/resident_mib"] > 10 for row in rows)
