"""Products with the encoder at the surviving latents, differentiable and sparse."""

from typing import Any

import torch
from einops import reduce
from jaxtyping import Float

from .autograd import SparsityPattern, opaque_to_compiler, vmap_by_loop
from .sparse_products import sampled_products, sparse_decode, transposed_latent_sums


class _EncoderProducts(torch.autograd.Function):
    """See :func:`encoder_products`."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        _, _, _, products, means, *_ = inputs
        return products.clone(), means.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], _output: Any) -> None:
        x, b_dec, W_enc, _, _, indices, order, experts, *others = inputs
        ctx.num_experts, ctx.pool, ctx.ragged = others
        ctx.save_for_backward(x, b_dec, W_enc, indices, order, experts)
        ctx.save_for_forward(x, b_dec, W_enc, indices, order, experts)
        ctx.set_materialize_grads(False)

    @staticmethod
    def _restore(ctx: Any) -> tuple[Any, ...]:
        x, b_dec, W_enc, indices, order, experts = ctx.saved_tensors
        size = W_enc.shape[1]
        latents = SparsityPattern(indices, size, order, ctx.pool, ctx.ragged)
        return x - b_dec, W_enc, latents, SparsityPattern(experts, ctx.num_experts)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        grad, grad_means = grads
        centered, W_enc, latents, experts = _EncoderProducts._restore(ctx)
        if grad is None:
            grad = W_enc.new_zeros(latents.indices.shape)
        size = latents.size // experts.size
        # A mean takes an equal part of each of its latents.
        part = None if grad_means is None else grad_means / size
        grad_x = grad_b_dec = grad_W = None
        # The gradient of b_dec is one product for all tokens: not to be rounded.
        with torch.autocast(W_enc.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                grad_x = sparse_decode(grad, W_enc.T, latents)
                if part is not None:
                    sums = reduce(W_enc, "d (N n) -> N d", "sum", n=size)
                    grad_x = grad_x + sparse_decode(part, sums, experts)
            if ctx.needs_input_grad[1]:
                # The sum of all tokens' gradients, none of which is formed.
                total = _totals(grad, latents)
                if part is not None:
                    total = total + _totals(part, experts).repeat_interleave(size)
                grad_b_dec = -(W_enc @ total.to(W_enc.dtype))
            if ctx.needs_input_grad[2]:
                grad_W = transposed_latent_sums(grad, centered, latents)
                if part is not None:
                    shared = transposed_latent_sums(part, centered, experts)
                    by_expert = grad_W.unflatten(1, (-1, size))
                    if torch.is_grad_enabled():
                        # A graph of this gradient is being built: nothing may change in place.
                        grad_W = (by_expert + shared.unsqueeze(-1)).flatten(1)
                    else:
                        by_expert.add_(shared.unsqueeze(-1))
        return grad_x, grad_b_dec, grad_W, *[None] * 8

    @staticmethod
    def jvp(ctx: Any, *tangents: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        centered, W_enc, latents, experts = _EncoderProducts._restore(ctx)
        x_t, b_dec_t, W_t = tangents[:3]
        size = latents.size // experts.size
        products = torch.zeros_like(latents.indices, dtype=W_enc.dtype)
        means = torch.zeros_like(experts.indices, dtype=W_enc.dtype)
        pairs = []
        if x_t is not None:
            pairs.append((x_t, W_enc))
        if b_dec_t is not None:
            pairs.append((-b_dec_t.expand_as(centered), W_enc))
        if W_t is not None:
            pairs.append((centered, W_t))
        for rows, W in pairs:
            products = products + sampled_products(rows, W.T, latents)
            of_experts = reduce(W, "d (N n) -> N d", "mean", n=size)
            means = means + sampled_products(rows, of_experts, experts)
        return products, means

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
        results = vmap_by_loop(_EncoderProducts, info, in_dims, inputs)
        products, means = zip(*results, strict=True)
        return (torch.stack(products), torch.stack(means)), (0, 0)


def _totals(values: torch.Tensor, pattern: SparsityPattern) -> torch.Tensor:
    # A sum of thousands of bfloat16 numbers in bfloat16 would be wrong.
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    zeros = values.new_zeros(pattern.size + 1)
    sums = zeros.index_add(0, pattern.indices.flatten(), values.flatten())
    return sums[: pattern.size]


_encoder_products = opaque_to_compiler(_EncoderProducts)


def encoder_products(
    x: Float[torch.Tensor, "tokens d_in"],
    b_dec: Float[torch.Tensor, " d_in"],
    W_enc: Float[torch.Tensor, "d_in d_sae"],
    products: Float[torch.Tensor, "tokens k"],
    means: Float[torch.Tensor, "tokens experts_per_token"] | None,
    latents: SparsityPattern,
    experts: SparsityPattern,
) -> tuple[
    Float[torch.Tensor, "tokens k"],
    Float[torch.Tensor, "tokens experts_per_token"] | None,
]:
    """
    Make known products with the encoder differentiable, at the surviving latents only.

    The encoder's gradient is then as sparse as the activations: sums over the tokens that
    kept a latent, in memory that is written once. The gradient of ``b_dec`` is a product
    of one vector with the weights, instead of one for each token.

    Args:
        x: Inputs, ``[tokens, d_in]``.
        b_dec: Vector that is subtracted from each, ``[d_in]``.
        W_enc: Encoder weights, ``[d_in, d_sae]``.
        products: ``(x - b_dec) . W_enc[:, j]`` for each surviving latent j; a gradient
            that they have themselves is dropped.
        means: ``(x - b_dec)`` times the mean encoder vector of each selected expert,
            likewise; None if they are not wanted.
        latents: The surviving latents of each token.
        experts: The selected experts of each token; latent j belongs to expert
            ``j // (d_sae / experts.size)``.

    Returns:
        ``products`` and ``means``, as functions of the first three arguments.
    """
    no_means = means is None
    if no_means:
        means = products[:, :0]
        experts = experts._replace(indices=experts.indices[:, :0])
    products, means = _encoder_products(
        x,
        b_dec,
        W_enc,
        products,
        means,
        latents.indices,
        latents.order,
        experts.indices,
        experts.size,
        latents.pool,
        latents.ragged,
    )
    return products, None if no_means else means
