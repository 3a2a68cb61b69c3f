"""Memory that work needs, for tests."""

import json
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile


def peak_bytes(function: Any, trace: Path) -> int:
    """The most that torch's CPU allocator holds at once, beyond what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    profiler.export_chrome_trace(str(trace))
    held = peak = 0
    for event in json.loads(trace.read_text())["traceEvents"]:
        if event.get("name") == "[memory]":
            held += event["args"]["Bytes"]
            peak = max(peak, held)
    return peak
