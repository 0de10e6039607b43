"""Mixtures whose experts are modules of their own, which not every rank runs.

transformers holds the experts of a layer as one module; the code that comes with a model may not.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


def experts_of_their_own(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    """Yield the lists of experts that are modules of their own, by name."""
    for name, part in model.named_modules():
        if isinstance(part, nn.ModuleList) and "expert" in name.rpartition(".")[2].lower():
            yield name, part
