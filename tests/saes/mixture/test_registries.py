"""Names are registered once: types, errors and the documentation agree with the registries."""

from pathlib import Path
from typing import Any, get_args

import pytest

from sae_lens_scale import ScaleSAEConfig, ScaleTrainingSAEConfig
from sae_lens_scale.saes.mixture.feature_scaling import (
    DECOMPOSITIONS,
    DecompositionName,
)
from sae_lens_scale.saes.mixture.routing import GATES, GateName
from sae_lens_scale.saes.mixture.selection import SELECTIONS, TopKOver

REGISTRIES: dict[str, tuple[dict[Any, Any], Any]] = {
    "gate": (GATES, GateName),
    "topk_over": (SELECTIONS, TopKOver),
    "decomposition": (DECOMPOSITIONS, DecompositionName),
}
ROWS = {
    "gate": [[f'`"{n}"`', gate.formula, gate.source] for n, gate in GATES.items()],
    "topk_over": [[f'`"{n}"`', s.meaning] for n, s in SELECTIONS.items()],
    "decomposition": [[f'`"{n}"`', d.meaning] for n, d in DECOMPOSITIONS.items()],
}


@pytest.mark.parametrize("field", list(REGISTRIES))
def test_types_name_what_is_registered(field: str):
    registry, names = REGISTRIES[field]
    assert tuple(registry) == get_args(names)


@pytest.mark.parametrize("field", list(REGISTRIES))
def test_another_name_is_refused_with_those_that_are_registered(field: str):
    registry, _ = REGISTRIES[field]
    cfg = ScaleTrainingSAEConfig if field == "decomposition" else ScaleSAEConfig
    for name in registry:
        assert getattr(cfg(d_in=8, d_sae=1024, **{field: name}), field) == name
    for wrong in ("nonsense", ["softmax"], None):
        with pytest.raises(ValueError) as error:
            cfg(d_in=8, d_sae=1024, **{field: wrong})
        assert str(error.value) == (
            f"{field} must be one of {tuple(registry)}, got {wrong!r}"
        )


@pytest.mark.parametrize("field", list(REGISTRIES))
def test_the_documentation_lists_what_is_registered(field: str):
    page = Path(__file__).parents[3] / "docs" / "architectures.md"
    lines = page.read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith(f"| `{field}` |"))
    table = []
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in line.strip("|").split("|")])
    assert table == ROWS[field]
