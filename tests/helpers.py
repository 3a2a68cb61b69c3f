"""Small SAEs, models and texts, and comparisons, for all tests."""

import copy
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from reference import ReferenceSAE
from sae_lens import HookedSAETransformer
from sae_lens.saes.sae import SAE, TrainStepInput
from transformer_lens import HookedTransformerConfig

from sae_lens_scale import (
    ScaleTrainingSAE,
    ScaleTrainingSAEConfig,
    SwitchTrainingSAE,
    SwitchTrainingSAEConfig,
)
from sae_lens_scale.loading.docstrings import docstring_corpus


def randomize(sae: Any, seed: int = 0) -> None:
    """Give every parameter random values of a sensible scale, biases included."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sae.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        scale = {"omega": 0.5, "b_enc": 0.3, "W_low_pass": 0.3}.get(name, 0.6)
        parameter.data.copy_(noise * scale)


_SMALL: dict[str, Any] = {
    "d_in": 10,
    "d_sae": 60,
    "num_experts": 5,
    "k": 6,
    "dtype": "float64",
}


def scale_sae(seed: int = 0, **overrides: Any) -> ScaleTrainingSAE:
    """A small random Scale SAE in float64: 12 latents per expert, 2 of 5 experts."""
    settings = {**_SMALL, "experts_per_token": 2, **overrides}
    sae = ScaleTrainingSAE(ScaleTrainingSAEConfig(**settings))
    randomize(sae, seed)
    return sae


def switch_sae(seed: int = 0, **overrides: Any) -> SwitchTrainingSAE:
    """A small random Switch SAE in float64: 12 latents in each of 5 experts."""
    sae = SwitchTrainingSAE(SwitchTrainingSAEConfig(**{**_SMALL, **overrides}))
    randomize(sae, seed)
    return sae


def reference_of(sae: Any) -> ReferenceSAE:
    """Oracle on the SAE's own parameters, so that gradients can be compared."""
    cfg = sae.cfg
    return ReferenceSAE(
        W_enc=sae.W_enc,
        b_enc=sae.b_enc,
        W_dec=sae.W_dec,
        b_dec=sae.b_dec,
        W_router=sae.W_router,
        b_router=sae.b_router,
        k=cfg.k,
        experts_per_token=cfg.experts_per_token,
        gate=cfg.gate,
        topk_over=cfg.topk_over,
        rescale_acts_by_decoder_norm=cfg.rescale_acts_by_decoder_norm,
        apply_b_dec_to_input=cfg.apply_b_dec_to_input,
        omega=getattr(sae, "omega", None),
        decomposition=getattr(cfg, "decomposition", "mean"),
        W_low_pass=getattr(sae, "W_low_pass", None),
        num_shared_experts=cfg.num_shared_experts,
    )


def step_input(
    x: torch.Tensor, dead: torch.Tensor | None = None, is_logging_step: bool = False
) -> TrainStepInput:
    return TrainStepInput(
        sae_in=x,
        coefficients={},
        dead_neuron_mask=dead,
        n_training_steps=0,
        is_logging_step=is_logging_step,
    )


def reconstruct(sae: Any, x: torch.Tensor) -> torch.Tensor:
    """Reconstruct as splicing does; the SAE's own forward pass, sparse, rounds otherwise."""
    return sae.decode(sae.encode(x)) if isinstance(sae, SAE) else sae(x)


def gradients(sae: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradient of ``loss`` for every parameter; zeros where there is none."""
    names, parameters = zip(*sae.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return {
        name: torch.zeros_like(parameter) if gradient is None else gradient
        for name, parameter, gradient in zip(names, parameters, found, strict=True)
    }


def assert_close(
    actual: torch.Tensor, expected: torch.Tensor, atol: float = 1e-9
) -> None:
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


def assert_same_gradients(
    sae: Any, actual: torch.Tensor, expected: torch.Tensor, atol: float = 1e-9
) -> None:
    want = gradients(sae, expected)
    for name, gradient in gradients(sae, actual).items():
        torch.testing.assert_close(
            gradient, want[name], atol=atol, rtol=1e-9, msg=lambda m: f"{name}: {m}"
        )


def random_transformer(
    tokenizer: Any, n_layers: int, n_heads: int, d_head: int
) -> HookedSAETransformer:
    """
    A random transformer of width ``n_heads * d_head`` in float32.

    For tests that depend on SAELens's machinery and not on a language model that knows
    anything: it runs in milliseconds.
    """
    d_model = n_heads * d_head
    cfg = HookedTransformerConfig(
        model_name="tiny",
        n_layers=n_layers,
        d_model=d_model,
        n_heads=n_heads,
        d_head=d_head,
        d_mlp=2 * d_model,
        n_ctx=128,
        d_vocab=len(tokenizer),
        act_fn="silu",
        gated_mlp=True,
        normalization_type="RMS",
        positional_embedding_type="rotary",
        rotary_dim=d_head,
        seed=0,
        device="cpu",
    )
    return HookedSAETransformer(cfg, copy.deepcopy(tokenizer)).eval()


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """Writing more bytes to a file fails, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@cache
def small_corpus() -> Dataset:
    """A few hundred documents of real text, read in a second."""
    return docstring_corpus(
        "train",
        roots=[Path(torch.nn.__file__).parent, Path(torch.optim.__file__).parent],
        min_total_characters=100_000,
    )
