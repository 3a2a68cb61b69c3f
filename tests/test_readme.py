"""The README's Python: settings that are valid, code that runs."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from sae_lens import HookedSAETransformer
from sae_lens.saes.sae import SAE, TrainingSAEConfig

from sae_lens_scale import (
    ScaleTrainingSAE,
    ScaleTrainingSAEConfig,
    SwitchTrainingSAEConfig,
)

README = (Path(__file__).parents[1] / "README.md").read_text()
TRAIN, INITIALIZE, SPLICE = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_training_snippets_are_valid_up_to_the_runner():
    # Running them needs a model hub.
    namespace: dict[str, Any] = {
        "raw_activations": torch.randn(13_000, 768),
    }
    settings = TRAIN[: TRAIN.index("sae = LanguageModelSAETrainingRunner")]
    start = INITIALIZE[: INITIALIZE.index("LanguageModelSAETrainingRunner")]
    exec(settings.replace("24_576", "3_072") + start, namespace)
    assert isinstance(namespace["sae"], ScaleTrainingSAE)
    cfg = namespace["cfg"]
    assert cfg.sae.num_experts == 64
    # SAELens finds this out only when training starts.
    buffer = cfg.n_batches_in_buffer * cfg.context_size
    assert buffer >= cfg.train_batch_size_tokens


def test_splicing_snippet_runs(smollm2: HookedSAETransformer, tmp_path: Path):
    cfg = ScaleTrainingSAEConfig(d_in=576, d_sae=1_152, num_experts=8)
    cfg.metadata.hook_name = "blocks.8.hook_resid_post"
    ScaleTrainingSAE(cfg).save_inference_model(tmp_path)

    class OfflineTransformer(HookedSAETransformer):
        @classmethod
        def from_pretrained_no_processing(cls, *_: Any, **__: Any) -> Any:  # type: ignore[override]
            return smollm2

    source = SPLICE.replace("import SAE, HookedSAETransformer", "import SAE")
    namespace: dict[str, Any] = {
        "HookedSAETransformer": OfflineTransformer,
        "activations": torch.randn(3, 576),
    }
    exec(source.replace('"output"', repr(str(tmp_path))), namespace)
    assert isinstance(namespace["sae"], SAE)
    assert namespace["cache"][f"{namespace['hook']}.hook_sae_acts_post"].shape == (
        1,
        4,
        1_152,
    )


def test_table_of_config_fields_states_the_defaults():
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]*) \|", README, re.MULTILINE))
    scale = ScaleTrainingSAEConfig(d_in=512, d_sae=1024)
    switch = SwitchTrainingSAEConfig(d_in=512, d_sae=1024)
    own = names(ScaleTrainingSAEConfig) - names(TrainingSAEConfig)
    assert set(rows) == own
    for name, text in rows.items():
        stated = re.findall(r"[\w.]+", text)
        assert stated[0] == str(getattr(scale, name)), name
        if "switch: `" in text:
            assert stated[-1] == str(getattr(switch, name)), name


def names(config_class: Any) -> set[str]:
    return {field.name for field in fields(config_class)}
