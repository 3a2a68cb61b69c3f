"""Fixtures of the tests of analysis."""

import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from sae_lens_scale.loading.smollm2 import fetch_smollm2


@pytest.fixture(scope="module")
def delphi() -> Iterator[None]:
    """delphi without its requirements, kept beside the language model's files."""
    if find_spec("delphi") is not None:
        yield
        return
    folder = fetch_smollm2().with_name("eai-delphi-0.1.3")
    if not folder.exists():
        with TemporaryDirectory(prefix=".delphi-", dir=folder.parent) as temporary:
            whole = Path(temporary, folder.name)
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
            subprocess.run([*pip, "--target", whole, "eai-delphi==0.1.3"], check=True)
            whole.rename(folder)
    sys.path.append(str(folder))
    yield
    sys.path.remove(str(folder))
