"""Fixtures of the tests of analysis."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from helpers import randomize
from sae_lens import HookedSAETransformer
from sae_lens.load_model import load_model
from sae_lens.registry import get_sae_class

_SETTINGS: dict[str, dict[str, int]] = {
    "scale": {"num_experts": 4, "k": 6},
    "switch": {"num_experts": 4, "k": 6},
    "topk": {"k": 6},
    "abstopk": {"k": 6},
    "standard": {},
}


@pytest.fixture(scope="session")
def make_sae() -> Callable[..., Any]:
    """Function that makes a random SAE, by default for the tiny model's first layer."""

    def make(
        architecture: str = "scale",
        hook: str = "blocks.0.hook_resid_post",
        **settings: Any,
    ) -> Any:
        sae_class, config_class = get_sae_class(architecture)
        own = _SETTINGS.get(architecture, {})
        settings = {"d_in": 32, "d_sae": 64, **own, **settings}
        sae: Any = sae_class(config_class(**settings))
        randomize(sae)
        sae.cfg.metadata.hook_name = hook
        sae.cfg.metadata.context_size = 16
        sae.cfg.metadata.prepend_bos = True
        return sae

    return make


@pytest.fixture(scope="session")
def make_tokens() -> Callable[..., torch.Tensor]:
    """Function that makes random tokens: each row has BOS first, the first and last an EOS."""

    def make(seed: int = 0, rows: int = 7, length: int = 16) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(3, 1_000, (rows, length), generator=generator)
        # SmolLM2's tokenizer: BOS is 1, EOS is 2.
        tokens[:, 0] = 1
        tokens[0, length // 2] = 2
        tokens[-1] = tokens[0]
        return tokens

    return make


class Kind(NamedTuple):
    """
    A language model of one of the kinds that SAELens knows, with SmolLM2's tokenizer.

    ``hook`` is what an SAE may call the activations after its first layer, ``own_hook`` what
    it does, and ``n_ctx`` the number of tokens that it reads.
    """

    model: Any
    hook: str
    own_hook: str
    n_ctx: int = 128


@pytest.fixture(
    scope="session",
    params=["HookedTransformer", "SAETransformerBridge", "AutoModelForCausalLM"],
)
def kind(
    request: pytest.FixtureRequest, tiny_model: HookedSAETransformer, tiny_llama: Path
) -> Kind:
    """A random two-layer transformer of each kind, of width 32."""
    hook = "blocks.0.hook_resid_post"
    if request.param == "HookedTransformer":
        return Kind(tiny_model, hook, hook)
    if request.param == "AutoModelForCausalLM":
        model = load_model(request.param, str(tiny_llama))
        return Kind(model, "model.layers.0", "model.layers.0")
    pytest.importorskip("transformer_lens.model_bridge")
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

    bridge = SAETransformerBridge.boot_transformers(str(tiny_llama))
    return Kind(bridge, hook, "blocks.0.hook_out")


@pytest.fixture(scope="session")
def overflowing() -> Callable[[int], Callable[..., torch.Tensor]]:
    """Function that makes a hook that lets one token of the first passage overflow."""

    def make(token: int) -> Callable[..., torch.Tensor]:
        def overflow(x: torch.Tensor, hook: Any) -> torch.Tensor:
            x = x.clone()
            x[0, token] = torch.inf
            return x

        return overflow

    return make
