"""
GPU kernels for the products of mixture-of-experts SAEs, in Triton.

Nothing here knows autograd, and nothing waits for the GPU. Sums are formed in float32, or
float64 where the result is that, and in the same order each time. All tensors may have any
strides; rows that are contiguous are read fastest. Indices are int64 and not checked: one
that is out of range, but for the number of latents, which is no latent's, reads or writes
memory that is not the tensor's.

In all kernels, whatever is multiplied by a stride is int64: a million rows of width 4096
have more numbers than int32.
"""

from .grouped import grouped_decode, grouped_encode, grouped_sums
from .launch import supports
from .sparse import latent_sums, sampled_products

__all__ = [
    "grouped_decode",
    "grouped_encode",
    "grouped_sums",
    "latent_sums",
    "sampled_products",
    "supports",
]
