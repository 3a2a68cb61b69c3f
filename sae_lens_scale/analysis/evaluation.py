"""Loss Recovered: the language model's loss with an SAE (equation A.2 of the Scale SAE paper)."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.saes.temporal_sae import TemporalSAE
from sae_lens.saes.transcoder import Transcoder
from sae_lens.training.activation_scaler import ActivationScaler
from tqdm.auto import tqdm

from .activations import (
    heads_are_joined,
    into_heads,
    of_heads,
    require_finite,
    require_reached,
    require_tokens,
)
from .corpus import Tokens, excluded_ids, token_batches
from .language_model import LanguageModel, as_input, hook_of

# Hooks by their names, as ``run_with_hooks`` takes them.
_Hooks = list[tuple[str, Callable[..., torch.Tensor]]]


@dataclass(frozen=True)
class LossRecovered:
    """
    Cost of splicing an SAE into the language model, against zeros in its place.

    Cross-entropies are in nats per predicted token.

    Attributes:
        score: (with_ablation - with_sae) / (with_ablation - without_sae), equation A.2:
            1 if nothing is lost, 0 if the SAE is no better than zeros; SAELens's
            ``ce_loss_score``.
        with_sae: Cross-entropy with the reconstruction in place of the activations;
            SAELens's ``ce_loss_with_sae``.
        without_sae: Cross-entropy of the language model as it is.
        with_ablation: Cross-entropy with zeros in place of the activations.
        predictions: Number of predicted tokens that these are means over.
    """

    score: float
    with_sae: float
    without_sae: float
    with_ablation: float
    predictions: int


@torch.no_grad()
def loss_recovered(
    model: LanguageModel,
    sae: SAE[Any],
    tokens: Tokens,
    *,
    max_batches: int | None = None,
    exclude_special_tokens: bool | Iterable[int] = True,
    activation_scaler: ActivationScaler | None = None,
    verbose: bool = False,
) -> LossRecovered:
    """
    Measure equation A.2 on any batches of tokens.

    The numbers are those of ``sae_lens.evals.run_evals`` on the same tokens: the ablation
    puts zeros (not means) at *all* positions, special tokens included; the reconstruction
    leaves special tokens as they are; and predictions made *at* special tokens (from the
    BOS, say) are left out of all three means, while predictions *of* them count.

    A transcoder's output, and zeros, are put at the hook that it predicts
    (``hook_name_out``), where SAELens would put them at the hook that it reads.

    Args:
        model: The language model that the SAE was trained on, as for
            :func:`.top_activating_contexts`.
        sae: A mixture or any other SAE or transcoder of SAELens whose metadata names its
            hook.
        tokens: As for :func:`.top_activating_contexts`.
        max_batches: Stop after so many batches.
        exclude_special_tokens: Ids of tokens to leave alone; ``True`` for the
            tokenizer's BOS, EOS and their like.
        activation_scaler: The trainer's, for a training SAE whose normalisation is not
            folded in.
        verbose: Show a progress bar.

    Raises:
        ValueError: If the SAE's metadata names no hook of the model; if ``tokens`` are
            not such batches, or longer than the model's context; if nothing is predicted,
            the ablation changes nothing, or activations or losses are NaN or infinite.
    """
    source = hook_of(model, sae)
    target, target_field = source, "hook_name"
    if isinstance(sae, Transcoder) or sae.cfg.metadata.hook_name_out:
        target_field = "hook_name_out"
        target = hook_of(model, sae, target_field)
    scaler = activation_scaler or ActivationScaler()
    excluded = excluded_ids(model, exclude_special_tokens)
    sums: dict[str, float] = defaultdict(float)
    predictions = 0
    reached: set[str] = set()
    batches = token_batches(tokens, max_batches)
    for i, ids in enumerate(
        tqdm(batches, desc="Loss recovered", total=max_batches, disable=not verbose)
    ):
        ids = as_input(model, ids)
        ignored = torch.isin(ids, excluded.to(ids.device))
        predictions += int((~ignored[:, :-1]).sum())
        hooks: dict[str, _Hooks] = {
            "with_sae": _splice(sae, source, target, scaler, ignored, i),
            "without_sae": [],
            "with_ablation": [(target, _ablation(sae, target, reached))],
        }
        for name, of_pass in hooks.items():
            with heads_are_joined(sae):
                _, loss = model.run_with_hooks(
                    ids, return_type="both", loss_per_token=True, fwd_hooks=of_pass
                )
            left_out = ignored[:, :-1].to(loss.device)
            require_finite(f"the loss {name}", loss.unsqueeze(-1), i, left_out)
            sums[name] += loss[~left_out].double().sum().item()
        require_reached(target_field, target, target in reached)
    if not predictions:
        raise ValueError(
            "tokens must hold at least one token to predict that does not follow a "
            "special one, got none"
        )
    with_sae, without_sae, with_ablation = (
        sums[name] / predictions
        for name in ("with_sae", "without_sae", "with_ablation")
    )
    if with_ablation == without_sae:
        raise ValueError(
            "zeros at the SAE's hook must change the model's loss, got "
            f"{without_sae} with and without"
        )
    return LossRecovered(
        score=(with_ablation - with_sae) / (with_ablation - without_sae),
        with_sae=with_sae,
        without_sae=without_sae,
        with_ablation=with_ablation,
        predictions=predictions,
    )


def _splice(
    sae: SAE[Any],
    source: str,
    target: str,
    scaler: ActivationScaler,
    ignored: torch.Tensor,
    batch: int,
) -> _Hooks:
    """Hooks that put the SAE's output for what is at one hook in place of what is at another."""
    read: list[torch.Tensor] = []

    def keep(x: torch.Tensor, **_: Any) -> torch.Tensor:
        sae_in = of_heads(sae, x, source, sae.cfg.d_in)
        require_tokens(source, x, ignored.shape)
        # A loss would not tell which token it was.
        require_finite("activations", sae_in, batch, ignored)
        read.append(sae_in)
        return x

    def replace(x: torch.Tensor, **_: Any) -> torch.Tensor:
        if not read:
            raise ValueError(
                "sae.cfg.metadata.hook_name must be a hook that the model reaches before "
                f"{target}, got {source!r}"
            )
        old = of_heads(sae, x, target, sae.W_dec.shape[-1])
        sae_in = scaler.scale(read.pop().to(sae.device))
        sae_out = _reconstruct(sae, sae_in).to(old.dtype)
        new = scaler.unscale(sae_out).to(old.device)
        new = torch.where(ignored.unsqueeze(-1).to(old.device), old, new)
        return into_heads(sae, x, new)

    return [(source, keep), (target, replace)]


def _reconstruct(sae: SAE[Any], x: torch.Tensor) -> torch.Tensor:
    if isinstance(sae, (Transcoder, TemporalSAE)):
        # Decoding lacks a skip connection, or what was predicted from the passage.
        return sae(x.to(sae.dtype))
    # The forward pass might add the error term, and nothing would be lost.
    return sae.decode(sae.encode(x))


def _ablation(
    sae: SAE[Any], target: str, reached: set[str]
) -> Callable[..., torch.Tensor]:
    """Hook that puts zeros in place of activations, and notes that it was reached."""

    def ablate(x: torch.Tensor, **_: Any) -> torch.Tensor:
        reached.add(target)
        old = of_heads(sae, x, target, sae.W_dec.shape[-1])
        return into_heads(sae, x, torch.zeros_like(old))

    return ablate
