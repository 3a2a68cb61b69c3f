"""The README's and the examples' use of a model hub, against one on this machine."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from integration import gpt2
from integration.hub import Hub, running_hub
from sae_lens import SAE

import sae_lens_scale  # noqa: F401  (makes the architectures known)

ROOT = Path(__file__).parents[1]
NOBODY = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def hub_with_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A hub with GPT-2 and OpenWebText, and a cache of its own."""
    with running_hub(tmp_path_factory.mktemp("client")) as hub:
        gpt2.publish(hub, tmp_path_factory.mktemp("published"))
        yield hub


def run(folder: Path, *command: str) -> str:
    """Run a Python script in a folder, with no host but this one to connect to."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={
            **os.environ,
            **dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), NOBODY),
            "PYTHONPATH": str(ROOT),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_the_READMEs_code_with_a_model_and_a_dataset_of_the_hub(
    hub_with_gpt2: Hub, tmp_path: Path
):
    text = (ROOT / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    load = 'HookedSAETransformer.from_pretrained_no_processing("gpt2")'
    for there, here in {
        "from sae_lens import ": "from sae_lens import HookedSAETransformer, ",
        "load_smollm2()": load,
        '"smollm2"': '"gpt2"',
        "d_in=576": "d_in=768",
        '"docstrings"': repr(gpt2.DATASET),
        'override_model=model, override_dataset=docstring_corpus("train")': "",
    }.items():
        assert there in code
        code = code.replace(there, here)
    (tmp_path / "readme.py").write_text(code)
    run(tmp_path, str(ROOT / "tests" / "short_run.py"), "readme.py")
    sae = SAE.load_from_disk(tmp_path / "my-sae")
    assert (sae.cfg.architecture(), sae.cfg.d_in) == ("scale", 768)
    assert sae.cfg.metadata.dataset_path == gpt2.DATASET


def test_train_scale_gpt2(hub_with_gpt2: Hub, tmp_path: Path):
    example = ROOT / "examples" / "train_scale_gpt2.py"
    run(tmp_path, str(ROOT / "tests" / "short_run.py"), str(example))
    sae = SAE.load_from_disk(tmp_path / "outputs" / "scale-gpt2")
    assert (sae.cfg.architecture(), sae.cfg.d_sae) == ("scale", 24_576)


def test_the_demo_on_GPT2(hub_with_gpt2: Hub, tmp_path: Path):
    example = ROOT / "examples" / "train_scale_smollm2.py"
    arguments = (
        f"--model gpt2 --dataset {gpt2.DATASET} --output demo --training_tokens 256 "
        "--batch_size 128 --expansion 2 --num_experts 4 --k 8 --context_size 64 "
        # For which only one of the model's blocks has to run.
        "--eval_batches 1 --hook_name blocks.0.hook_resid_post --explorer_tokens 64 "
        "--prompts_per_batch 4"
    )
    out = run(tmp_path, str(example), *arguments.split())
    assert "Everything is in demo" in out
    for name in ("scale", "switch", "topk"):
        sae = SAE.load_from_disk(tmp_path / "demo" / name)
        assert sae.cfg.architecture() == name
        assert sae.cfg.metadata.model_name == "gpt2"
