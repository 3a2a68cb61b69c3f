"""
Sparse products of mixture-of-experts SAEs; nothing here knows SAELens.

Autograd functions over two backends, plain PyTorch and Triton. Every operation has a slow
counterpart written straight from the formula, which the tests hold it to.
"""

from .autograd import SparsityPattern
from .buffers import BufferPool
from .dense_decode import decode_dense, decoder_norm
from .encoder_products import encoder_products
from .grouped_products import grouped_decode, grouped_encode
from .host_number import HostNumber
from .indexing import index_select, lookup
from .sparse_latents import SparseLatents
from .sparse_products import (
    latent_sums,
    sampled_products,
    sparse_decode,
    transposed_latent_sums,
)

__all__ = [
    "BufferPool",
    "HostNumber",
    "SparseLatents",
    "SparsityPattern",
    "decode_dense",
    "decoder_norm",
    "encoder_products",
    "grouped_decode",
    "grouped_encode",
    "index_select",
    "latent_sums",
    "lookup",
    "sampled_products",
    "sparse_decode",
    "transposed_latent_sums",
]
