"""
A training step does not wait for the GPU, but for two numbers that are on their way.

Without a GPU, a step is computed on torch's meta device, whose tensors have no data: whatever
asks for a number, or for a size that depends on one, raises there, and code takes the branches
of other devices than the CPU.
"""

import contextlib
import copy
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from helpers import draw, scale_sae, step_input, switch_sae
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sae_lens_scale.ops import (
    HostNumber,
    SparsityPattern,
    sampled_products,
    sparse_decode,
    torch_backend,
)
from sae_lens_scale.saes.mixture import batch, dead_latents

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
needs_triton = pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")


class _TensorsStay(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        devices = {
            leaf.device
            for leaf in tree_leaves((args, kwargs, result))
            if isinstance(leaf, torch.Tensor) and leaf.dim()
        }
        if len(devices) > 1:
            raise RuntimeError(f"{func} copies between the device and the host")
        return result


@contextlib.contextmanager
def watching() -> Iterator[None]:
    """Refuses copies between the device and the host, of tensors or of Python's numbers."""

    def numbers_stay(make: Any) -> Any:
        def made(*args: Any, **kwargs: Any) -> Any:
            result = make(*args, **kwargs)
            if result.is_meta:
                raise RuntimeError(f"{make.__name__} copies numbers to the device")
            return result

        return made

    with (
        mock.patch.object(torch, "tensor", numbers_stay(torch.tensor)),
        mock.patch.object(torch, "as_tensor", numbers_stay(torch.as_tensor)),
        mock.patch.object(
            torch.Tensor, "new_tensor", numbers_stay(torch.Tensor.new_tensor)
        ),
        _TensorsStay(),
    ):
        yield


class Arriving:
    """
    Stands in for a HostNumber.

    Attributes:
        reads: The numbers that were asked for, of all objects: True for the losses' flag.
        most_dead: What those of dead latents say.
    """

    reads: list[int | bool]
    most_dead: int

    def __init__(self, number: torch.Tensor):
        assert number.is_meta
        self._value = True if number.dtype == torch.bool else self.most_dead

    def has_arrived(self) -> bool:
        return False

    def read(self) -> int | bool:
        self.reads.append(self._value)
        return self._value


@pytest.fixture
def arriving(monkeypatch: pytest.MonkeyPatch) -> type[Arriving]:
    """Makes the meta device compute as a GPU would, but for what its kernels do."""
    from sae_lens_scale.ops import triton_backend

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(triton_backend, "supports", lambda _: True)
    for module in (triton_backend.sparse, triton_backend.grouped):
        monkeypatch.setattr(module, "launch", lambda *_, **__: None)
    # The meta device has no autocast.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda *_: torch.float32)
    arriving = type("Arriving", (Arriving,), {"reads": [], "most_dead": 0})
    for module in (batch, dead_latents):
        monkeypatch.setattr(module, "HostNumber", arriving)
    return arriving


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.masked_select(x > 0),
        lambda x: x.unique(),
        lambda x: torch.bincount(x.long()),
        lambda x: x.repeat_interleave(x.long()),
        lambda x: torch.tensor([1, 2], device=x.device),
        lambda x: x.new_tensor([1, 2]),
        lambda x: torch.unravel_index(x.long(), (2, 2)),
        lambda x: torch.zeros(3).to(x.device),
        lambda x: x[torch.zeros(2, dtype=torch.int64)],
    ],
)
def test_what_waits_is_noticed(wait: Callable[[torch.Tensor], Any]):
    with watching(), pytest.raises(RuntimeError):
        wait(torch.zeros(4, device="meta"))


@needs_triton
@pytest.mark.parametrize("most_dead", [0, 7, 8])
@pytest.mark.parametrize(
    "make", [scale_sae, partial(scale_sae, num_shared_experts=1), switch_sae]
)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"multi_topk_coefficient": 0.1, "decoder_init_norm": 0.1},
        {"rescale_acts_by_decoder_norm": False, "normalize_activations": "layer_norm"}
        | {"aux_loss_coefficient": 0.0},
        {"use_sparse_activations": False},
        {"dtype": "bfloat16", "d_in": 16, "d_sae": 80},
    ],
)
def test_a_step_waits_for_two_numbers_alone(
    make: Callable[..., Any],
    settings: dict[str, Any],
    most_dead: int,
    arriving: type[Arriving],
    monkeypatch: pytest.MonkeyPatch,
):
    arriving.most_dead = most_dead
    # Products as on GPUs: torch's own for bfloat16.
    monkeypatch.setattr(
        torch_backend,
        "has_grouped_kernel",
        lambda a, *sizes: (
            hasattr(F, "grouped_mm")
            and a.dtype == torch.bfloat16
            and not any(n % 8 for n in sizes)
        ),
    )
    sae = make(**{"dtype": "float32", **settings}).to("meta")
    x = torch.zeros(9, sae.cfg.d_in, device="meta")
    dead = torch.zeros(sae.cfg.d_sae, dtype=torch.bool, device="meta")
    with watching():
        for _ in range(2):
            sae.training_forward_pass(step_input(x, dead)).loss.backward()
    # Once to know whether, once to know how many; of finite losses, those of the first step.
    of_dead = [most_dead] * (2 if most_dead else 1)
    if not sae.cfg.aux_loss_coefficient:
        of_dead = []
    assert arriving.reads == [*of_dead, *of_dead, True]


@needs_triton
@pytest.mark.usefixtures("arriving")
def test_products_with_fewer_latents_of_some_tokens_wait_for_nothing():
    indices = torch.zeros(9, 3, dtype=torch.int64, device="meta")
    values = torch.zeros(9, 3, device="meta", requires_grad=True)
    weights = torch.zeros(20, 5, device="meta", requires_grad=True)
    latents = SparsityPattern(indices, 20, ragged=True)
    with watching():
        rows = sparse_decode(values, weights, latents)
        sampled_products(rows, weights, latents).sum().backward()


@needs_triton
def test_saelens_trainer_waits_for_nothing_else(arriving: type[Arriving]):
    # Of sparse activations it asks how many latents fired, which waits: docs/performance.md.
    sae = scale_sae(
        dtype="float32", multi_topk_coefficient=0.1, use_sparse_activations=False
    ).to("meta")
    trainer: Any = SAETrainer(
        SAETrainerConfig(
            n_checkpoints=0,
            checkpoint_path=None,
            save_final_checkpoint=False,
            total_training_samples=100,
            train_batch_size_samples=9,
            device="meta",
            autocast=False,
            lr=1e-3,
            lr_end=1e-3,
            lr_scheduler_name="constant",
            lr_warm_up_steps=0,
            lr_decay_steps=0,
            n_restart_cycles=1,
            adam_beta1=0.9,
            adam_beta2=0.999,
            dead_feature_window=1,
            feature_sampling_window=100,
            logger=LoggingConfig(log_to_wandb=False),
        ),
        sae,
        iter([]),
    )
    with watching():
        for _ in range(2):
            trainer.step(torch.zeros(9, 10, device="meta"))
            trainer.n_training_steps += 1
    assert arriving.reads == [0, 0, True]


class Late(HostNumber):
    """A number that has never arrived when it is asked for."""

    def has_arrived(self) -> bool:
        return False


@pytest.fixture
def after_nan(monkeypatch: pytest.MonkeyPatch) -> Any:
    """An SAE after a step whose losses were NaN, as on a GPU."""
    monkeypatch.setattr(batch, "HostNumber", Late)
    sae = scale_sae()
    good = step_input(draw(9, 10))
    sae.training_forward_pass(good)
    good.n_training_steps = 1
    bad = step_input(draw(9, 10) * torch.nan)
    bad.n_training_steps = 2
    sae.training_forward_pass(good)
    sae.training_forward_pass(bad).loss.backward()
    return sae


def test_losses_that_arrive_late_stop_the_next_step(after_nan: Any):
    after = step_input(draw(9, 10))
    after.n_training_steps = 3
    for _ in range(2):
        with pytest.raises(ValueError, match=r"step 2 \(mse_loss nan.*shape \(9, 10\)"):
            after_nan.training_forward_pass(after)


def test_no_file_is_written_after_losses_that_were_not_finite(
    after_nan: Any, tmp_path: Path
):
    for save in (
        lambda: after_nan.save_model(tmp_path / "saved"),
        lambda: after_nan.save_inference_model(tmp_path / "exported"),
        lambda: torch.save(after_nan.state_dict(), tmp_path / "state.pt"),
        lambda: torch.save(copy.deepcopy(after_nan).state_dict(), tmp_path / "copy.pt"),
    ):
        with pytest.raises(ValueError, match="not finite at training step 2 "):
            save()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    weights = scale_sae(seed=1).state_dict()
    after_nan.load_state_dict(weights)
    after_nan.save_model(tmp_path / "saved")
    after_nan.training_forward_pass(step_input(draw(9, 10)))


def test_a_loss_without_a_gradient_is_looked_at_at_once(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(batch, "HostNumber", Late)
    sae = scale_sae()
    with torch.no_grad(), pytest.raises(ValueError, match="not finite"):
        sae.training_forward_pass(step_input(draw(9, 10) * torch.nan))
    sae.state_dict()


@needs_gpu
@pytest.mark.parametrize("make", [scale_sae, switch_sae])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_does_not_wait_for_the_gpu(make: Callable[..., Any], dtype: str):
    settings = {"d_in": 16, "d_sae": 80, "multi_topk_coefficient": 0.1}
    sae = make(dtype=dtype, **settings).cuda()
    x = draw(64, 16).to("cuda", sae.dtype)
    dead = (torch.arange(80) % 3 == 0).cuda()

    def step() -> None:
        sae.training_forward_pass(step_input(x, dead)).loss.backward()

    # Compiles kernels.
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
