"""
Registry of the foreign checkpoint formats.

A new format is a module beside this one with a subclass of :class:`CheckpointFormat`, and
an entry in ``FORMATS``: loaders, error messages and the command line's help read this list.
"""

from typing import Any

from .checkpoint_format import CheckpointFormat, listed
from .multi_expert import MultiExpertFormat
from .scale import ScaleFormat
from .switch import SwitchFormat

FORMATS: list[CheckpointFormat] = [SwitchFormat(), MultiExpertFormat(), ScaleFormat()]


def recognise(state: dict[str, Any]) -> CheckpointFormat:
    """
    Find the format all of whose ``marks`` are in a state dict; of several the one with
    the most.

    Raises:
        ValueError: If no format's marks are all there.
    """
    found = [form for form in FORMATS if form.marks <= state.keys()]
    if not found:
        known = "; ".join(
            f"{form.name} (has {', '.join(sorted(form.marks))})" for form in FORMATS
        )
        raise ValueError(f"of no known format: {known}; got {listed(state)}")
    return max(found, key=lambda form: len(form.marks))


__all__ = ["FORMATS", "CheckpointFormat", "recognise"]
