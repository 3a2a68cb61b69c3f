"""The precision that a language model runs in."""

import torch


def fast_bfloat16(device: str | torch.device) -> bool:
    """
    Whether products in bfloat16 are worth it, for SAELens's ``autocast_lm``.

    Args:
        device: Where the products are computed; of several GPUs the current one is asked.

    Returns:
        False where they take many times as long as in float32, as on x86 CPUs without
        AVX-512, and on GPUs that emulate them.
    """
    kind = torch.device(device).type
    if kind == "cpu":
        # torch's own criterion (its inductor asks the same), of no public name.
        known = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
        return bool(torch.backends.mkldnn.is_available() and known and known())
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return True
