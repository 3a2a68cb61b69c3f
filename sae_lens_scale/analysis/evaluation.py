"""Loss Recovered: the language model's loss with an SAE (equation A.2 of the Scale SAE paper)."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.evals import get_recons_loss
from sae_lens.training.activation_scaler import ActivationScaler
from tqdm.auto import tqdm

from sae_lens_scale.upstream import HookedTransformer

from .contexts import Tokens, excluded_ids, heads_are_joined, hook_of, token_batches


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
    model: HookedTransformer,
    sae: SAE[Any],
    tokens: Tokens,
    *,
    max_batches: int | None = None,
    exclude_special_tokens: bool | Iterable[int] = True,
    activation_scaler: ActivationScaler | None = None,
    verbose: bool = False,
) -> LossRecovered:
    """
    Measure equation A.2 with SAELens's evaluation, on any batches of tokens.

    The numbers are those of ``sae_lens.evals.run_evals`` on the same tokens. In SAELens,
    the ablation puts zeros (not means) at *all* positions, special tokens
    included; the reconstruction leaves special tokens as they are; and predictions made
    *at* special tokens (from the BOS, say) are left out of all three means, while
    predictions *of* them count.

    Args:
        model: The language model that the SAE was trained on.
        sae: A mixture or any other SAE of SAELens whose metadata names its hook.
        tokens: As for :func:`.top_activating_contexts`.
        max_batches: Stop after so many batches.
        exclude_special_tokens: Ids of tokens to leave alone; ``True`` for the
            tokenizer's BOS, EOS and their like.
        activation_scaler: The trainer's, for a training SAE whose normalisation is not
            folded in.
        verbose: Show a progress bar.

    Raises:
        ValueError: If the SAE's metadata names no hook of the model; if ``tokens`` are
            not such batches; if nothing is predicted, or the ablation changes nothing.
    """
    hook_of(model, sae)
    excluded = excluded_ids(model, exclude_special_tokens)
    sums: dict[str, float] = defaultdict(float)
    predictions = 0
    device = next(model.parameters()).device
    batches = token_batches(tokens, max_batches)
    # SAELens's hooks join the heads of hook_z themselves.
    with heads_are_joined(sae):
        for batch in tqdm(
            batches, desc="Loss recovered", total=max_batches, disable=not verbose
        ):
            batch = batch.to(device)
            losses = get_recons_loss(
                sae,
                model,
                activation_scaler or ActivationScaler(),
                batch,
                compute_kl=False,
                compute_ce_loss=True,
                ignore_tokens=excluded.tolist(),
            )
            counted = ~torch.isin(batch[:, :-1], excluded.to(batch.device))
            predictions += int(counted.sum())
            for name, loss in losses.items():
                sums[name] += loss[counted.to(loss.device)].double().sum().item()
    if not predictions:
        raise ValueError(
            "tokens must hold at least one token to predict that does not follow a "
            "special one, got none"
        )
    with_sae, without_sae, with_ablation = (
        sums[f"ce_loss_{name}"] / predictions
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
