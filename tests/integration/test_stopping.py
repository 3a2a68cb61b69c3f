"""The language model's pass ends at the hook, for every kind of model that SAELens takes."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from helpers import small_corpus
from integration.runs import runner_config, sae_config
from sae_lens import HookedSAETransformer
from sae_lens.load_model import load_model
from sae_lens.training.activations_store import ActivationsStore

from sae_lens_scale.loading.smollm2 import smollm2_folder

LAYERS = 30
Modules = Mapping[str, torch.nn.Module]


def modules_run(model: Any, modules: Modules, hook: str) -> list[str]:
    """Names of the modules that run while SAELens's store reads activations at a hook."""
    cfg = runner_config(sae_config("scale", d_in=576), hook_name=hook, context_size=8)
    store = ActivationsStore.from_config(model, cfg, override_dataset=small_corpus())
    ran: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
        for name, module in modules.items()
    ]
    try:
        assert store.get_activations(store.get_batch_tokens(1)).any()
    finally:
        for handle in handles:
            handle.remove()
    return ran


def hugging_face() -> tuple[Any, Modules]:
    model: Any = load_model("AutoModelForCausalLM", str(smollm2_folder()), "cpu")
    return model, modules_of(model.model)


def bridge() -> tuple[Any, Modules]:
    pytest.importorskip("transformer_lens.model_bridge")
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

    model = SAETransformerBridge.boot_transformers(str(smollm2_folder()), device="cpu")
    return model, modules_of(model.original_model)


def modules_of(llama: Any) -> Modules:
    layers = {str(i): layer for i, layer in enumerate(llama.model.layers)}
    return layers | {"head": llama.lm_head}


def test_a_HookedTransformer_stops_after_the_hooks_block(smollm2: HookedSAETransformer):
    layers = {str(i): block for i, block in enumerate(smollm2.blocks)}
    modules = layers | {"head": smollm2.unembed}
    for hook in ("blocks.8.hook_resid_post", "blocks.8.attn.hook_q"):
        assert modules_run(smollm2, modules, hook) == [*map(str, range(9))]
    last = modules_run(smollm2, modules, f"blocks.{LAYERS - 1}.hook_resid_post")
    assert last == [*map(str, range(LAYERS))]


@pytest.mark.parametrize(
    ("load", "hook", "inner", "last", "runs_head"),
    [
        (hugging_face, "model.layers.8", "model.layers.8.self_attn", "model.layers.29", False),
        # Of the last block, the bridge runs the head, too.
        (bridge, "blocks.8.hook_out", "blocks.8.mlp.hook_out", "blocks.29.hook_out", True),
    ],
)  # fmt: skip
def test_other_models_stop_there_too(
    load: Callable[[], tuple[Any, Modules]],
    hook: str,
    inner: str,
    last: str,
    runs_head: bool,
):
    model, modules = load()
    first_nine = [*map(str, range(9))]
    assert modules_run(model, modules, hook) == first_nine
    # Hugging Face's block does not even end.
    assert modules_run(model, modules, inner) in (first_nine, first_nine[:-1])
    whole = [*map(str, range(LAYERS)), *(["head"] if runs_head else [])]
    assert modules_run(model, modules, last) == whole
