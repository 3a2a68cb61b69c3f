"""
Products over the surviving latents of each token, and over no others.

Three products of tokens' ``values`` ``[tokens, k]``, dense ``rows`` ``[tokens, width]``
and per-latent ``weights`` ``[num_latents, width]``, each linear in both of its factors:

- :func:`sparse_decode`, ``out[t] = sum_i values[t, i] weights[indices[t, i]]``;
- :func:`sampled_products`, ``out[t, i] = rows[t] . weights[indices[t, i]]``;
- :func:`latent_sums`, ``out[j] = sum of values[t, i] rows[t] over all indices[t, i] = j``.

They are each other's derivatives, to any order and in forward mode too: the gradient of
one in one of its factors is another one. So an SAE whose TopK keeps k latents needs no
``[tokens, d_sae]`` tensor, forward or backward.
"""

import torch
from jaxtyping import Float

from . import torch_backend
from .autograd import BilinearProduct, SparsityPattern
from .backend import backend_for


def sparse_decode(
    values: Float[torch.Tensor, "tokens k"],
    weights: Float[torch.Tensor, "num_latents width"],
    latents: SparsityPattern,
) -> Float[torch.Tensor, "tokens width"]:
    """
    Sum the rows of each token's latents, weighted by its values.

    Args:
        values: Activations of the selected latents, ``[tokens, k]``.
        weights: One row for each latent, ``[num_latents, width]``; the decoder, say.
        latents: The latents of each token.

    Returns:
        ``[tokens, width]``.
    """
    return _SPARSE_DECODE(values, weights, latents)


def sampled_products(
    rows: Float[torch.Tensor, "tokens width"],
    weights: Float[torch.Tensor, "num_latents width"],
    latents: SparsityPattern,
) -> Float[torch.Tensor, "tokens k"]:
    """
    Dot products of each token's row with the rows of its latents.

    Args:
        rows: One row for each token, ``[tokens, width]``.
        weights: One row for each latent, ``[num_latents, width]``; an encoder
            transposed, say.
        latents: The latents of each token.

    Returns:
        ``[tokens, k]``.
    """
    return _SAMPLED_PRODUCTS(rows, weights, latents)


def latent_sums(
    values: Float[torch.Tensor, "tokens k"],
    rows: Float[torch.Tensor, "tokens width"],
    latents: SparsityPattern,
) -> Float[torch.Tensor, "num_latents width"]:
    """
    Sum, for each latent, the rows of the tokens that selected it, weighted by its values.

    The product of the transposed sparse activations ``[num_latents, tokens]`` with
    ``rows``.

    Args:
        values: Values of the selected latents, ``[tokens, k]``.
        rows: One row for each token, ``[tokens, width]``.
        latents: The latents of each token.

    Returns:
        ``[num_latents, width]``; zero for a latent that nobody selected.
    """
    return _LATENT_SUMS(values, rows, latents)


def transposed_latent_sums(
    values: Float[torch.Tensor, "tokens k"],
    rows: Float[torch.Tensor, "tokens width"],
    latents: SparsityPattern,
) -> Float[torch.Tensor, "width num_latents"]:
    """
    :func:`latent_sums` transposed, as the gradient of an encoder is stored.

    Args:
        values: Values of the selected latents, ``[tokens, k]``.
        rows: One row for each token, ``[tokens, width]``.
        latents: The latents of each token.

    Returns:
        ``[width, num_latents]``, contiguous.
    """
    return _TRANSPOSED_LATENT_SUMS(values, rows, latents)


def _latent_sums(
    values: torch.Tensor, rows: torch.Tensor, latents: SparsityPattern
) -> torch.Tensor:
    out = latents.empty((latents.size, rows.shape[-1]), rows)
    backend_for(values, rows, out).latent_sums(values, rows, latents, out)
    return out


def _transposed_latent_sums(
    values: torch.Tensor, rows: torch.Tensor, latents: SparsityPattern
) -> torch.Tensor:
    out = latents.empty((rows.shape[-1], latents.size), rows)
    backend_for(values, rows, out).latent_sums(values, rows, latents, out.T)
    return out


_SPARSE_DECODE = BilinearProduct(
    # Read from the module at each call, so that another function may take its place.
    lambda values, weights, p: torch_backend.sparse_decode(values, weights, p),
    lambda grad, _, weights, p: sampled_products(grad, weights, p),
    lambda grad, values, _, p: latent_sums(values, grad, p),
)
_SAMPLED_PRODUCTS = BilinearProduct(
    lambda rows, weights, p: backend_for(rows, weights).sampled_products(
        rows, weights, p
    ),
    lambda grad, _, weights, p: sparse_decode(grad, weights, p),
    lambda grad, rows, _, p: latent_sums(grad, rows, p),
)
_LATENT_SUMS = BilinearProduct(
    _latent_sums,
    lambda grad, _, rows, p: sampled_products(rows, grad, p),
    lambda grad, values, _, p: sparse_decode(values, grad, p),
)
_TRANSPOSED_LATENT_SUMS = BilinearProduct(
    _transposed_latent_sums,
    lambda grad, _, rows, p: sampled_products(rows, grad.T, p),
    lambda grad, values, _, p: sparse_decode(values, grad.T, p),
)
