"""The embedded engine: samples from the trainer's own modules, in process, bit-independent of what else is running."""

from __future__ import annotations

from keel.engines.embedded.engine import EmbeddedEngine

__all__ = ["EmbeddedEngine"]
