"""HTML of the explorer page, with its data, style and script in it."""

import base64
import gzip
import re
from importlib.resources import files
from typing import Any

import numpy as np
import torch

from sae_lens_scale.files import dump_json

# In the order in which the browser runs them.
_SCRIPTS = ("data.js", "elements.js", "views.js", "page.js")


def pack(array: torch.Tensor) -> dict[str, str]:
    """
    Pack an array for the page: integers in the smallest type that holds all, floats in
    float32, compressed, in base64.
    """
    values = array.contiguous().numpy()
    if values.dtype.kind == "f":
        values = values.astype("<f4")
    else:
        least, most = (int(values.min()), int(values.max())) if values.size else (0, 0)
        types = ("i1", "<i2", "<i4") if least < 0 else ("u1", "<u2", "<u4")
        values = values.astype(
            next(
                t for t in types if np.iinfo(t).min <= least and most <= np.iinfo(t).max
            )
        )
    # Without the time of day the same data make the same page.
    packed = gzip.compress(values.tobytes(), compresslevel=6, mtime=0)
    return {
        "type": values.dtype.str.lstrip("<|"),
        "data": base64.b64encode(packed).decode(),
    }


def page(facts: dict[str, Any], arrays: dict[str, dict[str, str]]) -> str:
    """
    Put the page together.

    Args:
        facts: All that is no array; text in it may be of any kind.
        arrays: Results of :func:`pack` by name.
    """
    folder = files("sae_lens_scale.analysis.page")
    parts = {
        "style": folder.joinpath("page.css").read_text(encoding="utf-8"),
        # No text in it can end the element that it is in, or begin another.
        "data": dump_json({"facts": facts, "arrays": arrays}).replace("<", "\\u003c"),
        "script": "\n".join(
            folder.joinpath(name).read_text(encoding="utf-8") for name in _SCRIPTS
        ),
    }
    html = folder.joinpath("page.html").read_text(encoding="utf-8")
    return re.sub(r"/\*(\w+)\*/", lambda place: parts[place[1]], html)
