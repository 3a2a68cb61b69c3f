"""Registry of the foreign checkpoint formats."""

from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE
from typing_extensions import override

from sae_lens_scale import SwitchSAE
from sae_lens_scale.loading import authors_disk_loader, formats
from sae_lens_scale.loading.formats import FORMATS, recognise
from sae_lens_scale.loading.formats.switch import SwitchFormat


class RenamedFormat(SwitchFormat):
    """A Switch SAE whose tensors have names of one letter, as somebody else's might."""

    name = "Switch SAE of somebody else"
    marks = frozenset({"R"})
    axes = {"b": "d", "c": "d", "R": "Nd", "E": "Md", "D": "Md"}

    @override
    def tensors(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        names = {
            "b": "b_dec",
            "c": "b_router",
            "R": "router.weight",
            "E": "encoder.weight",
            "D": "decoder",
        }
        return super().tensors({names[name]: state[name] for name in state})


def random_state(axes: dict[str, str]) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    sizes = {"d": 10, "M": 40, "N": 4}
    return {n: torch.randn(*(sizes[i] for i in a)) for n, a in axes.items()}


def load(path: Path) -> SAE[Any]:
    cfg, tensors = authors_disk_loader(path, k=3, heaviside=False)
    sae = SAE.from_dict(cfg)
    sae.load_state_dict(tensors)
    return sae


def test_a_format_that_is_added_to_the_list_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "ae.pt"
    state = random_state(RenamedFormat.axes)
    torch.save(state, path)
    with pytest.raises(ValueError, match="of no known format"):
        load(path)
    monkeypatch.setattr(formats, "FORMATS", [*FORMATS, RenamedFormat()])
    sae = load(path)
    assert isinstance(sae, SwitchSAE)
    assert torch.equal(sae.W_dec, state["D"])
    torch.save({"W_enc": torch.ones(3)}, path)
    with pytest.raises(ValueError, match="Switch SAE of somebody else .has R."):
        load(path)


def test_of_several_formats_the_one_with_most_marks_is_meant():
    marks: dict[str, Any] = dict.fromkeys(["gate.weight", "omega"])
    assert recognise(marks).name == "Scale SAE of Xu et al."
    del marks["omega"]
    assert recognise(marks).name == "multi-expert SAE of Xu et al."


def test_a_refusal_names_each_format_and_its_marks():
    with pytest.raises(ValueError, match="of no known format") as refusal:
        recognise({"weight": torch.ones(1)})
    for form in FORMATS:
        assert form.name in str(refusal.value)
        assert all(mark in str(refusal.value) for mark in form.marks)
    assert len({form.name for form in FORMATS}) == len(FORMATS)
    assert len({form.marks for form in FORMATS}) == len(FORMATS)


def test_each_format_is_recognised_by_tensors_of_its_own():
    for form in FORMATS:
        assert form.marks <= form.axes.keys()
