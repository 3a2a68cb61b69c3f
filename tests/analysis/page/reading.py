"""Explorer pages read and made as their script and :func:`.explorer` do."""

import base64
import gzip
import json
import re
from typing import Any

import numpy as np

from sae_lens_scale.analysis.page import html


def _data(text: str) -> dict[str, Any]:
    found = re.search(r'id="data">(.*?)</script>', text, re.S)
    assert found is not None
    return json.loads(found[1])


def read(text: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Facts and arrays of a page, as its script reads them."""
    data = _data(text)
    arrays = {
        name: np.frombuffer(
            gzip.decompress(base64.b64decode(array["data"])), f"<{array['type']}"
        )
        for name, array in data["arrays"].items()
    }
    return data["facts"], arrays


def dense_activations(
    facts: dict[str, Any], arrays: dict[str, np.ndarray]
) -> np.ndarray:
    """Feature activations of all tokens of a page, ``[tokens, d_sae]``."""
    dense = np.zeros((len(arrays["tokens"]), facts["d_sae"]))
    firing = 0
    for token, count in enumerate(arrays["counts"]):
        row = 0
        for _ in range(count):
            row += arrays["gaps"][firing]
            strength = arrays["strengths"][firing] / facts["steps"]
            dense[token, arrays["alive"][row]] = strength * arrays["largest"][row]
            firing += 1
    assert firing == len(arrays["gaps"])
    return dense


def rebuilt(text: str, facts: dict[str, Any]) -> str:
    """The same page with other facts."""
    return html.page(facts, _data(text)["arrays"])
