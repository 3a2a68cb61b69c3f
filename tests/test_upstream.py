"""Parts that SAELens and TransformerLens may drop: one module imports them, and does without."""

import ast
import runpy
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from helpers import small_corpus
from integration.runs import HOOK, no_wandb, sae_config
from sae_lens import HookedSAETransformer, LanguageModelSAERunnerConfig, SAETrainer
from sae_lens.training.activations_store import ActivationsStore

from sae_lens_scale.upstream import buffer_argument

ROOT = Path(__file__).parents[1]
UPSTREAM = ROOT / "sae_lens_scale" / "upstream.py"
BUFFER_NAMES = {"n_batches_in_buffer", "n_sequences_in_buffer"}

# What transformer-lens 4 removed (docs/versions.md), and SAELens's class that is built on it.
REMOVED = {
    "sae_lens.HookedSAETransformer",
    "transformer_lens.BertNextSentencePrediction",
    "transformer_lens.HookedAudioEncoder",
    "transformer_lens.HookedEncoder",
    "transformer_lens.HookedEncoderDecoder",
    "transformer_lens.HookedTransformer",
    "transformer_lens.HookedTransformerConfig",
    "transformer_lens.components",
    "transformer_lens.loading",
    "transformer_lens.loading_from_pretrained",
    "transformer_lens.pretrained",
    "transformer_lens.train",
    "transformer_lens.utils",
}
# The bridge may change: SAELens calls it a beta.
MAY_VANISH = {*REMOVED, "sae_lens.analysis"}


def vanishing(source: str) -> Iterator[str]:
    """Names of SAELens and TransformerLens in a file that may vanish."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.keyword) and node.arg in BUFFER_NAMES:
            yield node.arg
        if isinstance(node, ast.Attribute) and node.attr in BUFFER_NAMES:
            yield node.attr
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            names = [f"{node.value.id}.{node.attr}"]
        for name in names:
            root, *parts = name.split(".")
            if root not in ("sae_lens", "transformer_lens"):
                continue
            starts = {".".join([root, *parts[:i]]) for i in range(len(parts) + 1)}
            if starts & MAY_VANISH or any(part.startswith("_") for part in parts):
                yield name


@pytest.mark.parametrize(
    "folder", ["sae_lens_scale", "reproduction", "examples", "benchmarks"]
)
def test_no_other_module_names_what_may_vanish(folder: str):
    paths = set((ROOT / folder).rglob("*.py")) - {UPSTREAM}
    assert paths
    for path in paths:
        assert not list(vanishing(path.read_text())), path


def test_all_that_upstream_names_may_vanish():
    found = {name.rpartition(".")[2] for name in vanishing(UPSTREAM.read_text())}
    assert found == {
        "HookedSAETransformer",
        "HookedTransformerConfig",
        "InterruptedException",
        "SAETransformerBridge",
        "_disable_hooks",
        "_get_input_token_device",
        "_parse_cfg_args",
        "convert_llama_weights",
    }


@dataclass
class RenamedConfig(LanguageModelSAERunnerConfig):
    """SAELens's config with the buffer's size under its new name."""

    n_batches_in_buffer: int = field(init=False, default=0)
    n_sequences_in_buffer: int = 20

    def __post_init__(self):
        self.n_batches_in_buffer = self.n_sequences_in_buffer
        super().__post_init__()


@pytest.mark.parametrize("config_class", [LanguageModelSAERunnerConfig, RenamedConfig])
def test_a_config_has_its_buffer_under_the_name_that_it_knows(
    config_class: type[LanguageModelSAERunnerConfig], tiny_model: HookedSAETransformer
):
    cfg = config_class(
        sae=sae_config("scale"),
        hook_name=HOOK,
        is_dataset_tokenized=False,
        logger=no_wandb(),
        verbose=False,
        **buffer_argument(24, config_class),
    )
    store = ActivationsStore.from_config(
        tiny_model, cfg, override_dataset=small_corpus()
    )
    assert store.n_batches_in_buffer == 24


def test_a_store_has_its_buffer_under_the_name_that_it_knows():
    assert buffer_argument(3, ActivationsStore) == {"n_batches_in_buffer": 3}


def test_what_has_no_buffer_is_refused():
    with pytest.raises(TypeError, match="^SAETrainer must take n_sequences_in_buffer"):
        buffer_argument(3, SAETrainer)


def test_a_moved_converter_leaves_hooked_transformer(monkeypatch: pytest.MonkeyPatch):
    moved = "transformer_lens.pretrained.weight_conversions.llama"
    monkeypatch.setitem(sys.modules, moved, None)
    names = runpy.run_path(str(UPSTREAM))
    assert names["HAS_HOOKED_TRANSFORMER"]
    assert names["HookedSAETransformer"] is HookedSAETransformer
    assert "convert_llama_weights" not in names


def test_training_loading_and_analysis_do_without_hooked_transformer(
    smollm2: HookedSAETransformer, tiny_llama: Path, text_folder: Path, tmp_path: Path
):
    pytest.importorskip("transformer_lens.model_bridge")
    script = ROOT / "tests" / "without_hooked_transformer.py"
    finished = subprocess.run(
        [sys.executable, script, tiny_llama, text_folder, tmp_path, *sorted(REMOVED)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    sentence = "Explained by a spliced SAE, of which there is one."
    loss = smollm2(sentence, return_type="loss").item()
    assert float(finished.stdout.splitlines()[-1]) == pytest.approx(loss, rel=1e-5)
