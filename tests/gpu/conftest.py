"""Tests that need a CUDA card: `make test-gpu`. Without one they fail, because they were asked for."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def card() -> torch.device:
    if not torch.cuda.is_available():
        pytest.fail("tests/gpu needs a CUDA card and a torch built for it; `make test` runs everything else")
    return torch.device("cuda", 0)
