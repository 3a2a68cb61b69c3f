"""Results that are kept, under names that say all that they depend on."""

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from sae_lens_scale.files import dump_json, read_json, write_whole


def digest(
    settings: dict[str, Any], tensors: Iterable[tuple[str, torch.Tensor]] = ()
) -> str:
    """
    Compute a short name for settings and tensors: others have another name.

    Args:
        settings: Values that JSON can hold, or whose ``str`` says what they are.
        tensors: Tensors by name, on any device.

    Returns:
        16 hexadecimal digits.
    """
    found = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in tensors:
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        found.update(flat.view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


def stored(path: Path, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """
    Read a result from its file, or compute it and write the file.

    Args:
        path: The file, JSON, which is written whole or not at all.
        compute: Function without arguments that returns the result.

    Raises:
        ValueError: If the file is not JSON.
    """
    if not path.exists():
        write_whole(path, dump_json(compute()))
    return read_json(path)
