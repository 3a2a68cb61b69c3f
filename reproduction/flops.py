"""
Floating-point operations (FLOPs) that a token costs an SAE.

Counted are products with vectors that are d_in long, each multiply-add as two FLOPs, as the
implementations of this package and of SAELens compute them. Not counted is what needs a few
operations for each pre-activation (biases, ReLU, TopK, softmax, norms of decoder rows, the
mean of an expert's products, optimizer and clipping) or happens once for each batch (the
gradient of b_dec in a mixture, the scaled encoder of a decomposition other than "mean").

In multiply-adds for each token and each of d_in, where M = d_sae, N = num_experts,
e = experts_per_token, A = e M / N (the latents that a token pays for), and
b = 1 with ``apply_b_dec_to_input``, else 0:

======================== =========================== ==============================
training step            forward                     backward
======================== =========================== ==============================
Scale, Switch            router N, encoder A,        router N, encoder k, decoder
                         decoder k                   2 k: survivors of TopK only
 ... omega, "mean"       (mean of the A products)    e, for the experts' means
 ... not sparse [1]_     decoder M instead of k      N + (1 + b) A + 2 M
TopK, Standard, JumpReLU encoder M, decoder M        4 M: of both products in both
                                                     of their factors [2]_
TopK, sparse [1]_        encoder M, decoder k        3 M + k
Gated                    encoder 3 M, decoder 2 M:   8 M: the gate's own product
                         two paths, and the gate's   has no gradient
                         own reconstruction
======================== =========================== ==============================

The Multi-TopK loss adds its m = min(4 k, A) - k latents to the decoder and 3 m to the backward
pass (2 m if not sparse).

A router whose gates are 1 and whose loads are not balanced has no backward pass.

Without training there is no backward pass, a Gated SAE needs encoder 2 M and decoder M,
omega is part of the encoder, and a mixture decodes k latents (its ``forward``;
``decode(encode(x))`` multiplies d_sae-wide activations where it runs on a GPU).

The dead-latent loss, with m dead latents in the expert that has most of them, adds e m to
a mixture's encoder and to its decoder and 3 e m to its backward pass (2 e m if not sparse);
to TopK's decoder M and to its backward pass 2 M.

.. [1] ``use_sparse_activations``: True by default in mixtures, False in SAELens's TopK.
.. [2] Inputs need no gradient, but SAELens's dense SAEs compute it, because they subtract
       b_dec (or b_dec times zero) before they encode.
"""

from dataclasses import dataclass, field

from sae_lens.saes.gated_sae import GatedSAEConfig, GatedTrainingSAEConfig
from sae_lens.saes.sae import SAEConfig, TrainingSAEConfig
from sae_lens.saes.topk_sae import TopKTrainingSAEConfig

from sae_lens_scale.saes import ScaleTrainingSAEConfig
from sae_lens_scale.saes.mixture import MixtureSAEConfig, MixtureTrainingSAEConfig
from sae_lens_scale.saes.mixture.learning import MULTI_TOPK_FACTOR

# Others of SAELens extend these configs and compute other things.
_DENSE = ("topk", "gated", "standard", "jumprelu")
# Multiply-adds for each token and each of d_in: router, encoder, decoder, backward pass.
_Products = tuple[int, int, int, int]


@dataclass(frozen=True)
class FlopsPerToken:
    """
    FLOPs for each token of a batch.

    SAEs that agree in ``encoder`` are what the Scale SAE paper calls FLOPs-matched. ``backward`` is
    0 for an SAE that is not trained, ``forward`` is ``router + encoder + decoder`` and ``total``
    ``forward + backward``.
    """

    router: int
    encoder: int
    decoder: int
    backward: int
    forward: int = field(init=False)
    total: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "forward", self.router + self.encoder + self.decoder)
        object.__setattr__(self, "total", self.forward + self.backward)


def flops_per_token(cfg: SAEConfig, dead_latents: int = 0) -> FlopsPerToken:
    """
    Count what an SAE computes for a token; the module says by which formulas.

    Args:
        cfg: Config of a Scale, Switch, TopK, Gated, Standard or JumpReLU SAE. With a training
            config a training step is counted, otherwise a reconstruction.
        dead_latents: Number of latents that the dead-latent loss computes: the dead ones of
            the expert that has most of them, or of a dense SAE.

    Raises:
        ValueError: If the architecture is another one, or there are not so many latents.
    """
    if isinstance(cfg, MixtureSAEConfig):
        most, products = cfg.expert_size, _mixture(cfg, dead_latents)
    elif cfg.architecture() in _DENSE:
        most, products = cfg.d_sae, _dense(cfg, dead_latents)
    else:
        raise ValueError(
            "cfg must be of a Scale, Switch, TopK, Gated, Standard or JumpReLU SAE, got "
            f"{cfg.architecture()!r}"
        )
    if not 0 <= dead_latents <= most:
        raise ValueError(f"dead_latents must be from 0 to {most}, got {dead_latents}")
    return FlopsPerToken(*(2 * cfg.d_in * n for n in products))


def _mixture(cfg: MixtureSAEConfig, most_dead: int) -> _Products:
    experts, k = cfg.num_experts, cfg.k
    active = cfg.experts_per_token * cfg.expert_size
    if not isinstance(cfg, MixtureTrainingSAEConfig):
        return (experts, active, k, 0)
    sparse = cfg.use_sparse_activations
    # Nothing tells the router anything if gates are 1 and loads are not balanced.
    learns = cfg.gate != "uniform" or cfg.load_balance_coefficient > 0
    encoder, decoder, backward = active, k, experts * learns + 3 * k
    if not sparse:
        decoder = cfg.d_sae
        # The factors of a product with x - b_dec that need a gradient.
        factors = 1 + cfg.apply_b_dec_to_input
        backward = experts * learns + factors * active + 2 * cfg.d_sae
    elif (
        isinstance(cfg, ScaleTrainingSAEConfig)
        and cfg.feature_scaling
        and cfg.decomposition == "mean"
    ):
        backward += cfg.experts_per_token
    if cfg.multi_topk_coefficient:
        runners_up = min(MULTI_TOPK_FACTOR * k, active) - k
        decoder, backward = decoder + runners_up, backward + (2 + sparse) * runners_up
    if most_dead and cfg.aux_loss_coefficient:
        dead = cfg.experts_per_token * most_dead
        decoder, backward = decoder + dead, backward + 2 * dead
        if sparse:
            encoder, backward = encoder + dead, backward + dead
    return (experts, encoder, decoder, backward)


def _dense(cfg: SAEConfig, dead_latents: int) -> _Products:
    wide = cfg.d_sae
    if isinstance(cfg, GatedSAEConfig):
        return (0, 2 * wide, wide, 0)
    if isinstance(cfg, GatedTrainingSAEConfig):
        return (0, 3 * wide, 2 * wide, 8 * wide)
    if not isinstance(cfg, TrainingSAEConfig):
        return (0, wide, wide, 0)
    decoder, backward = wide, 4 * wide
    if isinstance(cfg, TopKTrainingSAEConfig):
        if cfg.use_sparse_activations:
            decoder, backward = cfg.k, 3 * wide + cfg.k
        if dead_latents:
            decoder, backward = decoder + wide, backward + 2 * wide
    return (0, wide, decoder, backward)
