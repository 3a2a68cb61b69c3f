"""Whole training steps through the GPU's kernels, in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import assert_close, gradients, scale_sae, step_input, switch_sae

# In another process: whether Triton interprets is decided when it is imported.
SCRIPT = """
import sys
import torch
from helpers import gradients, scale_sae, step_input, switch_sae
from sae_lens_scale.ops import triton_backend

calls = set()
for name in (
    "sampled_products", "latent_sums", "grouped_encode", "grouped_decode", "grouped_sums"
):
    def count(*args, kernel=getattr(triton_backend, name), name=name):
        calls.add(name)
        return kernel(*args)
    setattr(triton_backend, name, count)
results = {}
for make in (scale_sae, switch_sae):
    sae = make(dtype="float32", multi_topk_coefficient=0.5)
    x, dead = torch.load(sys.argv[1])
    output = sae.training_forward_pass(step_input(x.float(), dead))
    results[make.__name__] = {
        "sae_out": output.sae_out,
        "decoded": sae.decode(sae.encode(x.float())),
        **gradients(sae, output.loss),
    }
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results[make.__name__]["autocast"] = sae(x.float()).float()
torch.save((calls, results), sys.argv[2])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
def test_training_through_the_gpu_kernels_agrees_with_plain_pytorch(tmp_path: Path):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(9, 10, generator=generator, dtype=torch.float64)
    dead = torch.rand(60, generator=generator) < 0.3
    torch.save((x, dead), tmp_path / "in.pt")
    subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path / "in.pt", tmp_path / "out.pt"],
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "PYTHONPATH": str(Path(__file__).parents[1]),
        },
        check=True,
    )
    calls, results = torch.load(tmp_path / "out.pt")
    assert len(calls) == 5, "these kernels alone were used"
    for make in (scale_sae, switch_sae):
        sae, got = make(multi_topk_coefficient=0.5), results[make.__name__]
        output = sae.training_forward_pass(step_input(x, dead))
        want = {
            "sae_out": output.sae_out,
            "decoded": sae.decode(sae.encode(x)),
            **gradients(sae, output.loss),
        }
        rough = got.pop("autocast")
        assert got.keys() == want.keys()
        for name, tensor in want.items():
            scale = float(tensor.abs().max().clamp(min=1))
            assert_close(got[name].double(), tensor, atol=2e-5 * scale)
        # bfloat16 may select other latents for a token.
        errors = (rough - want["decoded"]).norm(dim=-1) / want["decoded"].norm(dim=-1)
        assert errors.median() < 0.02
