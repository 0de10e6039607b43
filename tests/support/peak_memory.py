"""The peak of the allocations of torch on the CPU, exactly: that of live tensors."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import torch


def peak_bytes(run: Callable[[], None]) -> int:
    """Return the largest sum of the CPU allocations that `run` makes, less what it frees."""
    # Cycles hold what an earlier test left. Collected during the profile, its frees would count.
    gc.collect()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run()
    assert profile.profiler is not None
    results = profile.profiler.kineto_results
    assert results is not None
    recorded: Any = results.events()  # the stubs leave out the bytes of an event
    changes = sorted(
        (event.start_ns(), event.nbytes()) for event in recorded if event.name() == "[memory]"
    )
    assert changes
    return int(np.max(np.cumsum([size for _, size in changes])))
