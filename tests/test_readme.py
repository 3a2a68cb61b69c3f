"""The README's Python runs as it stands."""

import re
from pathlib import Path
from typing import Any

import pytest
from sae_lens import LanguageModelSAERunnerConfig
from sae_lens.saes.sae import SAE
from short_run import shorten_runs

README = (Path(__file__).parents[1] / "README.md").read_text()
(QUICK_START,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_quick_start_trains_loads_and_splices(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    # As it stands, but for its length.
    complete = LanguageModelSAERunnerConfig.__post_init__
    monkeypatch.setattr(LanguageModelSAERunnerConfig, "__post_init__", complete)
    shorten_runs()
    namespace: dict[str, Any] = {}
    exec(QUICK_START, namespace)
    sae: Any = SAE.load_from_disk(tmp_path / "my-sae")
    assert (sae.cfg.architecture(), sae.cfg.d_sae) == ("scale", 9_216)
    assert "torch.Size([1, 4, 9216])" in capsys.readouterr().out


def test_the_README_is_short():
    assert len(README.splitlines()) <= 130
