"""An engine that takes weights wrongly, and says that all went well."""

from __future__ import annotations

import torch

from keel.engines.base import WeightSource
from keel.engines.embedded.engine import EmbeddedEngine
from keel.sync.groups import tensor_groups


class DeafEngine(EmbeddedEngine):
    """Keeps its old weights of the groups in `deaf` and the tensors in `deaf_tensors`, and writes those of the groups
    in `garbled` back to front."""

    deaf: tuple[str, ...] = ()
    deaf_tensors: tuple[str, ...] = ()
    garbled: tuple[str, ...] = ()

    async def load_weights(self, source: WeightSource, version: int) -> None:
        own = self.policy.trained_parameters()
        groups = tensor_groups(own)
        names = [*self.deaf_tensors, *(name for group in self.deaf for name in groups[group])]
        kept = {name: own[name].detach().clone() for name in names}
        await super().load_weights(source, version)
        with torch.no_grad():
            for name, values in kept.items():
                own[name].copy_(values)
            for group in self.garbled:
                for name in groups[group]:
                    own[name].copy_(own[name].flatten().flip(0).view_as(own[name]))
