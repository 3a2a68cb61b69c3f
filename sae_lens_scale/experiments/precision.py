"""The precision that a language model runs in."""

import torch


def fast_bfloat16(device: str | torch.device) -> bool:
    """
    Whether products in bfloat16 are worth it, for SAELens's ``autocast_lm``.

    With instructions for them they take a fraction of float32's time; where they are
    emulated, as on x86 CPUs without AVX-512, many times as long.

    Args:
        device: Where the products are computed.
    """
    kind = torch.device(device).type
    if kind == "cpu":
        # torch's own criterion (its inductor asks the same), of no public name.
        return bool(
            torch.backends.mkldnn.is_available()
            and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        )
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return True
