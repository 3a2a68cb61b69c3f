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


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random float64 numbers, the same each time."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# A batch for the small SAEs below, and latents of theirs that count as dead.
X = draw(8, 10, seed=1)
DEAD = torch.arange(60) % 2 == 0


def randomize(sae: Any, seed: int = 0) -> None:
    """Give every parameter random values of a sensible scale, biases included."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sae.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        scale = {"omega": 0.5, "b_enc": 0.3, "W_low_pass": 0.3}.get(name, 0.6)
        parameter.data.copy_(noise * scale)


# Random weights, which tests/saes/mixture/test_start.py has otherwise. The router's factor is the
# default: what tests compare is the router that is applied.
_SMALL: dict[str, Any] = {
    "d_in": 10,
    "d_sae": 60,
    "num_experts": 5,
    "k": 6,
    "dtype": "float64",
    "normalize_activations": "none",
    "aux_loss_coefficient": 1 / 32,
    "multi_topk_coefficient": 0.0,
    "initialize_from_activations": False,
}


def scale_sae(seed: int = 0, **overrides: Any) -> ScaleTrainingSAE:
    """A small random Scale SAE in float64: 12 latents per expert, 2 of 5 experts."""
    settings = {**_SMALL, "experts_per_token": 2, "num_shared_experts": 0, **overrides}
    sae = ScaleTrainingSAE(ScaleTrainingSAEConfig(**settings))
    randomize(sae, seed)
    return sae


def switch_sae(seed: int = 0, **overrides: Any) -> SwitchTrainingSAE:
    """A small random Switch SAE in float64: 12 latents in each of 5 experts."""
    settings = {**_SMALL, "gate": "softmax", **overrides}
    sae = SwitchTrainingSAE(SwitchTrainingSAEConfig(**settings))
    randomize(sae, seed)
    return sae


def reference_of(sae: Any) -> ReferenceSAE:
    """Oracle on the SAE's own parameters, so that gradients can be compared."""
    cfg = sae.cfg
    W_router, b_router = sae.applied_router()
    return ReferenceSAE(
        W_enc=sae.W_enc,
        b_enc=sae.b_enc,
        W_dec=sae.W_dec,
        b_dec=sae.b_dec,
        W_router=W_router,
        b_router=b_router,
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


def subclass(cls: type, sae: Any) -> Any:
    """The same SAE as an instance of another class."""
    other = cls(copy.deepcopy(sae.cfg))
    other.load_state_dict(sae.state_dict())
    return other


def inference(sae: Any, **overrides: Any) -> Any:
    """Inference SAE with the parameters of a training SAE, nothing folded."""
    cfg = copy.deepcopy(sae.cfg.get_inference_sae_cfg_dict())
    other: Any = SAE.from_dict({**cfg, **overrides})
    other.load_state_dict(sae.state_dict(), strict=False)
    return other


def exported(sae: Any, folder: Path) -> Any:
    """Inference SAE that a training SAE was saved as."""
    sae.save_inference_model(folder)
    return SAE.load_from_disk(folder)


def gradients(sae: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradient of ``loss`` for every parameter; zeros where there is none."""
    names, parameters = zip(*sae.named_parameters(), strict=True)
    found = torch.autograd.grad(
        loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return dict(zip(names, found, strict=True))


def assert_close(actual: Any, expected: Any, atol: float = 1e-9) -> None:
    """Tensors, or sequences or dicts of them, are the same; to the bit if ``atol`` is 0."""
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


def assert_same_gradients(
    sae: Any, actual: torch.Tensor, expected: torch.Tensor
) -> None:
    torch.testing.assert_close(
        gradients(sae, actual), gradients(sae, expected), atol=1e-9, rtol=1e-9
    )


def assert_same_derivatives(
    got: torch.Tensor, want: torch.Tensor, *inputs: torch.Tensor, order: int = 2
) -> None:
    """Same values, and same derivatives for ``inputs`` up to ``order``."""
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)
    if not order or not want.requires_grad:
        return
    weights = draw(*got.shape, seed=9 + order)
    ours, theirs = (
        torch.autograd.grad(
            (result * weights).pow(2).sum(),
            inputs,
            create_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        for result in (got, want)
    )
    for a, b in zip(ours, theirs, strict=True):
        assert_same_derivatives(a, b, *inputs, order=order - 1)


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
