"""Pure-PyTorch operations of mixture-of-experts SAEs; nothing here knows SAELens.

Every operation has a slow counterpart written straight from the formula in
:mod:`reference`, which the tests hold it to.
"""

from .autograd import Selection
from .buffers import BufferPool
from .decode import decode_dense, decoder_norm
from .encoder_products import encoder_products
from .grouped_products import grouped_decode, grouped_encode
from .select import select_latents, take
from .sparse_products import (
    latent_sums,
    sampled_products,
    sparse_decode,
    transposed_latent_sums,
)
from .topk import select_topk
from .types import DecompositionName, GateName, SparseLatents, TopKOver

__all__ = [
    "BufferPool",
    "DecompositionName",
    "GateName",
    "Selection",
    "SparseLatents",
    "TopKOver",
    "decode_dense",
    "decoder_norm",
    "encoder_products",
    "grouped_decode",
    "grouped_encode",
    "latent_sums",
    "sampled_products",
    "select_latents",
    "select_topk",
    "sparse_decode",
    "take",
    "transposed_latent_sums",
]
