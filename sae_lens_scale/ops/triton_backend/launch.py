"""Launch of kernels, and what they compute with."""

import os
from typing import Any

import torch
import triton.language as tl

# Read when kernels are made, as Triton reads it.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

DOT_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
}


def supports(tensor: torch.Tensor) -> bool:
    """
    Say whether these kernels compute with a tensor.

    They do with float32, float16 and bfloat16 on NVIDIA GPUs that Triton supports, those of
    compute capability 8.0 or more; with TRITON_INTERPRET=1, which had to be set before
    Triton was imported, on all devices.
    """
    if tensor.dtype not in DOT_DTYPES:
        return False
    if INTERPRETED:
        return True
    if tensor.device.type != "cuda" or torch.version.hip:
        return False
    return torch.cuda.get_device_capability(tensor.device) >= (8, 0)


@torch.compiler.disable()
def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Launch a kernel; tensors first, and its constants by name."""
    # Triton launches on the current device, whatever the tensors' is.
    with torch.cuda.device_of(args[0]):
        # Fused as Triton does up to 3.9; what it does after has to be asked for.
        kernel[grid](*args, **constants, enable_fp_fusion=True)
