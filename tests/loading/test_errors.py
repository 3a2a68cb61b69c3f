"""Errors that name the setting at fault, before any work is done with it."""

import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers import small_corpus
from integration.runs import HOOK, new_sae
from sae_lens import HookedSAETransformer
from sae_lens.load_model import load_model
from sae_lens.training._interruption import InterruptedException, interrupt_callback
from sae_lens.training.activations_store import ActivationsStore

from sae_lens_scale.loading.errors import (
    first_prompt,
    is_of_the_machine,
    naming_text,
    require_context,
    require_device,
    require_hook,
)


def test_a_lack_of_memory_is_of_the_machine_whatever_its_type():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(10**14)
    assert is_of_the_machine(raised.value)
    assert is_of_the_machine(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_of_the_machine(ImportError("no such package"))
    for error in (RuntimeError("size mismatch"), ValueError(), OSError()):
        assert not is_of_the_machine(error)
    with pytest.raises(RuntimeError, match="^.enforce"), naming_text("text", "name"):
        torch.empty(10**14)


def test_an_interruption_while_a_text_is_read_is_not_blamed_on_its_name():
    # SAELens's runners leave this handler behind.
    before = signal.signal(signal.SIGTERM, interrupt_callback)
    try:
        with pytest.raises(InterruptedException), naming_text("text", "name"):
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_an_empty_text_is_called_empty():
    with (
        pytest.raises(ValueError, match="^text name cannot be loaded: it is empty; "),
        naming_text("text", "name"),
    ):
        next(iter([]))


def test_devices_on_which_nothing_can_be_computed_are_refused():
    require_device("device", "cpu")
    for device in ("meta", "nonsense", ""):
        with pytest.raises(ValueError, match=f"^device '{device}' cannot be used: "):
            require_device("device", device)


def test_contexts_longer_than_the_model_takes_are_refused(
    tiny_model: HookedSAETransformer, tiny_llama: Path
):
    for model in (tiny_model, load_model("AutoModelForCausalLM", str(tiny_llama))):
        require_context("context_size", 128, model)
        with pytest.raises(ValueError, match="context_size must be .* 128 .* got 129"):
            require_context("context_size", 129, model)
    # One that does not say how many it takes.
    require_context("context_size", 10**6, torch.nn.Linear(1, 1))


def store_of(model: Any, text: Any) -> ActivationsStore:
    sae = new_sae("scale")
    return ActivationsStore.from_sae(model, sae, text, store_batch_size_prompts=4)  # type: ignore[arg-type]


def test_the_first_prompt_stays_the_first(tiny_model: HookedSAETransformer):
    want = store_of(tiny_model, small_corpus()).get_batch_tokens()
    store = store_of(tiny_model, small_corpus())
    assert torch.equal(first_prompt("text", store), want[:1])
    assert torch.equal(first_prompt("text", store), want[:1])
    assert torch.equal(store.get_batch_tokens(), want)


def test_a_text_shorter_than_a_prompt_is_refused(tiny_model: HookedSAETransformer):
    store = store_of(tiny_model, Dataset.from_dict({"text": ["hello"]}))
    with pytest.raises(ValueError, match="^text x must hold a prompt of 16 tokens"):
        first_prompt("text x", store)


Z = "blocks.0.attn.hook_z"


@pytest.mark.parametrize(
    ("hook", "head", "d_in", "message"),
    [
        (HOOK, None, 32, None),
        (Z, 3, 8, None),
        (Z, None, 32, None),
        ("blocks.9.hook_resid_post", None, 32, "tiny has no hook 'blocks.9.hook_resid"),
        (HOOK, None, 16, f"the SAE must be as wide as the model at {HOOK}, 32, got 16"),
        (Z, 4, 8, f"hook_head_index must be one of the 4 heads at {Z}, got 4"),
        (HOOK, 0, 32, f"hook_head_index must be one of the 0 heads at {HOOK}, got 0"),
    ],
)
def test_a_hook_must_be_there_and_as_wide_as_the_SAE(
    hook: str,
    head: int | None,
    d_in: int,
    message: str | None,
    tiny_model: HookedSAETransformer,
):
    arguments = (tiny_model, "tiny", torch.zeros(1, 1).long(), hook, head, d_in)
    if message is None:
        require_hook(*arguments)
        return
    with pytest.raises(ValueError, match=re.escape(message)):
        require_hook(*arguments)


@pytest.mark.parametrize("hook", ["model.layers.9", "model.nothing"])
def test_a_module_that_a_Hugging_Face_model_lacks_is_named(hook: str, tiny_llama: Path):
    model: Any = load_model("AutoModelForCausalLM", str(tiny_llama))
    with pytest.raises(ValueError, match=f"^llama has no hook {hook!r}"):
        require_hook(model, "llama", torch.zeros(1, 1).long(), hook, None, 32)


def test_an_SAE_in_the_hooks_place_is_named(tiny_model: HookedSAETransformer):
    tokens = torch.zeros(1, 1).long()
    with (
        tiny_model.saes([new_sae("scale")]),  # type: ignore[list-item]
        pytest.raises(ValueError, match=r"an SAE is attached there, which reset_saes"),
    ):
        require_hook(tiny_model, "tiny", tokens, HOOK, None, 32)


def test_arguments_that_the_model_does_not_take_are_named(
    tiny_model: HookedSAETransformer,
):
    arguments = (tiny_model, "tiny", torch.zeros(1, 1).long(), HOOK, None, 32)
    require_hook(*arguments, {"shortformer_pos_embed": None})
    for wrong in ({"nonsense": 1}, {"stop_at_layer": 1}):
        with pytest.raises(ValueError, match=f"^model_kwargs .{list(wrong)[0]!r}"):
            require_hook(*arguments, wrong)


def test_the_model_runs_no_further_than_the_hook(tiny_model: HookedSAETransformer):
    ran: list[str] = []

    def note(x: torch.Tensor, hook: Any) -> None:
        ran.append(hook.name)

    with tiny_model.hooks([("blocks.1.hook_resid_pre", note)]):
        require_hook(tiny_model, "tiny", torch.zeros(1, 1).long(), HOOK, None, 32)
        assert ran == []
        tiny_model(torch.zeros(1, 1).long())
        assert ran


@pytest.mark.parametrize("token", [-1, 10**6])
def test_tokens_of_another_vocabulary_are_refused(
    token: int, tiny_model: HookedSAETransformer
):
    rows = Dataset.from_dict({"tokens": [[token] + [1] * 15]})
    with pytest.raises(ValueError, match=f"^text x must hold token ids .*{token}"):
        first_prompt("text x", store_of(tiny_model, rows))
