"""Pure-PyTorch operations of mixture-of-experts SAEs; nothing here knows SAELens.

Every operation has a slow counterpart written straight from the formula in
:mod:`sae_lens_scale.ops.reference`, which the tests hold it to.
"""

from .decode import decoder_norm, sparse_decode
from .grouped import grouped_decode, grouped_encode
from .topk import select_topk
from .types import DecompositionName, GateName, SparseLatents, TopKOver

__all__ = [
    "DecompositionName",
    "GateName",
    "SparseLatents",
    "TopKOver",
    "decoder_norm",
    "grouped_decode",
    "grouped_encode",
    "select_topk",
    "sparse_decode",
]
