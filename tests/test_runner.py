"""Training that is interrupted by signals, in this process."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import scale_sae, small_corpus
from sae_lens import (
    HookedSAETransformer,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
)
from sae_lens.saes.topk_sae import TopKTrainingSAEConfig
from sae_lens.training._interruption import InterruptedException
from safetensors import SafetensorError
from typing_extensions import override

from sae_lens_scale import ScaleTrainingSAEConfig, SwitchTrainingSAEConfig
from sae_lens_scale.runner import InterruptibleTrainingRunner, apply_lr_factors

BATCH = 128
STEPS = 12
NEVER = 100 * STEPS
SAES = {
    "scale": lambda **settings: ScaleTrainingSAEConfig(**settings, num_experts=4),
    "switch": lambda **settings: SwitchTrainingSAEConfig(**settings, num_experts=4),
    "topk": TopKTrainingSAEConfig,
}


def make_runner(
    model: HookedSAETransformer,
    output: Path,
    architecture: str = "scale",
    kind: type[LanguageModelSAETrainingRunner] = InterruptibleTrainingRunner,
    fused_optimizer: bool = False,
    lr_factors: dict[str, float] | None = None,
    **settings: Any,
) -> LanguageModelSAETrainingRunner:
    torch.manual_seed(0)
    fields: dict[str, Any] = {
        "sae": SAES[architecture](
            d_in=32,
            d_sae=64,
            k=4,
            normalize_activations="expected_average_only_in",
        ),
        "model_name": "tiny",
        "hook_name": "blocks.0.hook_resid_post",
        "is_dataset_tokenized": False,
        "context_size": 32,
        "training_tokens": BATCH * STEPS,
        "train_batch_size_tokens": BATCH,
        "store_batch_size_prompts": 8,
        "n_batches_in_buffer": 16,
        "n_batches_for_norm_estimate": 2,
        "lr": 1e-3,
        "logger": LoggingConfig(log_to_wandb=False),
        "checkpoint_path": str(output / "checkpoints"),
        "output_path": str(output / "sae"),
        **settings,
    }
    # SAELens's own runner does not know them.
    options: dict[str, Any] = {"fused_optimizer": True} if fused_optimizer else {}
    if lr_factors is not None:
        options["lr_factors"] = lr_factors
    return kind(
        LanguageModelSAERunnerConfig(**fields),
        override_model=model,
        override_dataset=small_corpus(),
        **options,
    )


def at_step(
    runner: LanguageModelSAETrainingRunner, step: int, do: Callable[[], None]
) -> list[int]:
    """Do something in the middle of a training step; returns the steps that begin."""
    steps: list[int] = []

    def count(tensor: torch.Tensor, *, hook: Any) -> None:
        steps.append(len(steps) + 1)
        if len(steps) == step:
            do()

    runner.sae.hook_sae_input.add_hook(count)
    return steps


def kill(signal_number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), signal_number)


def checkpoints(output: Path) -> list[Path]:
    return sorted(output.glob("checkpoints/*/*"))


@pytest.fixture(autouse=True)
def handlers_are_restored():
    """After any run the handlers are those from before it."""
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    yield
    after = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
        signal.signal(number, handler)
    assert after == before


@pytest.mark.parametrize("architecture", ["scale", "switch", "topk"])
@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_continues_where_it_stopped(
    architecture: str,
    signal_number: int,
    tiny_model: HookedSAETransformer,
    tmp_path: Path,
):
    runner = make_runner(tiny_model, tmp_path, architecture)
    steps = at_step(runner, 5, lambda: kill(signal_number))
    with pytest.raises(InterruptedException) as stop:
        runner.run()
    # The step in which the signal came is the last, and is finished.
    assert steps[-1] == 5
    (checkpoint,) = checkpoints(tmp_path)
    assert checkpoint.name == str(5 * BATCH)
    assert str(stop.value) == f"resume_from_checkpoint {checkpoint} goes on from here"
    assert not (tmp_path / "sae").exists()

    resumed = make_runner(
        tiny_model, tmp_path, architecture, resume_from_checkpoint=str(checkpoint)
    )
    steps = at_step(resumed, NEVER, kill)
    resumed.run()
    assert steps[-1] == STEPS - 5
    assert (tmp_path / "sae" / "sae_weights.safetensors").exists()


def test_checkpoint_holds_the_weights_at_the_end_of_the_step(
    tiny_model: HookedSAETransformer, tmp_path: Path
):
    interrupted = make_runner(tiny_model, tmp_path / "interrupted")
    at_step(interrupted, 5, kill)
    with pytest.raises(InterruptedException):
        interrupted.run()
    # A run to the same step, whose checkpoint SAELens itself writes.
    regular = make_runner(tiny_model, tmp_path / "regular", n_checkpoints=2)
    regular.run()
    by_name = {path.name: path for path in checkpoints(tmp_path / "regular")}
    expected, actual = by_name[str(5 * BATCH)], checkpoints(tmp_path / "interrupted")[0]
    names = {path.name for path in expected.iterdir()}
    assert {path.name for path in actual.iterdir()} == names
    for name in ("sae_weights.safetensors", "activations_store_state.safetensors"):
        assert (actual / name).read_bytes() == (expected / name).read_bytes(), name
    state, wanted = (torch.load(p / "trainer_state.pt") for p in (actual, expected))
    assert state["n_training_steps"] == wanted["n_training_steps"]
    torch.testing.assert_close(
        state["optimizer"]["state"], wanted["optimizer"]["state"], atol=0, rtol=0
    )


def test_second_signal_stops_at_once_without_a_checkpoint(
    tiny_model: HookedSAETransformer, tmp_path: Path
):
    runner = make_runner(tiny_model, tmp_path)

    def kill_twice() -> None:
        kill(signal.SIGINT)
        kill(signal.SIGTERM)

    at_step(runner, 5, kill_twice)
    with pytest.raises(InterruptedException, match="^no checkpoint was saved$"):
        runner.run()
    assert checkpoints(tmp_path) == []


def test_signal_before_the_first_step_stops_at_once(
    tiny_model: HookedSAETransformer, tmp_path: Path
):
    runner = make_runner(tiny_model, tmp_path)
    # The store runs the language model to estimate the activations' norm.
    steps = at_step(runner, NEVER, kill)
    with (
        tiny_model.hooks([("hook_embed", lambda tensor, hook: kill())]),
        pytest.raises(InterruptedException, match="^no checkpoint was saved$"),
    ):
        runner.run()
    assert (steps, checkpoints(tmp_path)) == ([], [])


def test_without_a_checkpoint_path_nothing_is_saved_and_the_text_says_so(
    tiny_model: HookedSAETransformer, tmp_path: Path
):
    runner = make_runner(tiny_model, tmp_path, checkpoint_path=None)
    steps = at_step(runner, 5, kill)
    with pytest.raises(InterruptedException, match="checkpoint_path is not set"):
        runner.run()
    assert steps[-1] == 5
    assert list(tmp_path.iterdir()) == []


def test_run_with_prefetching_is_interrupted_too(
    tiny_model: HookedSAETransformer, tmp_path: Path
):
    runner = make_runner(tiny_model, tmp_path, prefetch_llm_batches=True)
    at_step(runner, 5, kill)
    with pytest.raises(InterruptedException):
        runner.run()
    assert [path.name for path in checkpoints(tmp_path)] == [str(5 * BATCH)]


def test_error_in_a_step_is_raised_and_saves_nothing(
    tiny_model: HookedSAETransformer, tmp_path: Path
):
    def fail() -> None:
        raise ZeroDivisionError("in a step")

    runner = make_runner(tiny_model, tmp_path)
    at_step(runner, 5, fail)
    with pytest.raises(ZeroDivisionError, match="in a step"):
        runner.run()
    assert checkpoints(tmp_path) == []


def test_interrupted_runner_can_run_again(
    tiny_model: HookedSAETransformer, tmp_path: Path
):
    runner = make_runner(tiny_model, tmp_path, n_checkpoints=1)
    at_step(runner, 3, kill)
    with pytest.raises(InterruptedException):
        runner.run()
    runner.run()
    assert (tmp_path / "sae" / "sae_weights.safetensors").exists()


def test_signal_in_the_last_step_does_not_cost_the_result(
    tiny_model: HookedSAETransformer, tmp_path: Path
):
    runner = make_runner(tiny_model, tmp_path)
    at_step(runner, STEPS, kill)
    with pytest.raises(InterruptedException):
        runner.run()
    (checkpoint,) = checkpoints(tmp_path)
    assert checkpoint.name == str(STEPS * BATCH)
    make_runner(tiny_model, tmp_path, resume_from_checkpoint=str(checkpoint)).run()
    assert (tmp_path / "sae" / "sae_weights.safetensors").exists()


def test_signal_while_the_result_is_saved_does_not_cost_it(
    tiny_model: HookedSAETransformer, tmp_path: Path
):
    class Interrupted(InterruptibleTrainingRunner):
        @override
        def save_checkpoint(self, checkpoint_path: Path | None) -> None:
            kill()
            super().save_checkpoint(checkpoint_path)

    make_runner(
        tiny_model, tmp_path, kind=Interrupted, save_final_checkpoint=True
    ).run()
    assert [path.name for path in checkpoints(tmp_path)] == [f"final_{STEPS * BATCH}"]
    assert (tmp_path / "sae" / "sae_weights.safetensors").exists()


@pytest.mark.parametrize("architecture", ["scale", "switch", "topk"])
def test_fused_optimizer_trains_the_same_up_to_rounding(
    architecture: str, tiny_model: HookedSAETransformer, tmp_path: Path
):
    weights = []
    for fused in (True, False):
        output = tmp_path / str(fused)
        runner = make_runner(
            tiny_model, output, architecture, n_checkpoints=1, fused_optimizer=fused
        )
        weights.append(dict(runner.run().named_parameters()))
        (checkpoint,) = {p.parent for p in checkpoints(output)}
        state = torch.load(next(checkpoint.glob("*/trainer_state.pt")))
        assert bool(state["optimizer"]["param_groups"][0]["fused"]) == fused
    for name, parameter in weights[0].items():
        torch.testing.assert_close(parameter, weights[1][name], atol=1e-5, rtol=1e-5)


def test_a_resumed_run_chooses_its_optimizer_anew(
    tiny_model: HookedSAETransformer, tmp_path: Path
):
    runner = make_runner(tiny_model, tmp_path, fused_optimizer=True)
    at_step(runner, 5, kill)
    with pytest.raises(InterruptedException):
        runner.run()
    (checkpoint,) = checkpoints(tmp_path)
    resumed = make_runner(
        tiny_model, tmp_path, resume_from_checkpoint=str(checkpoint), n_checkpoints=1
    )
    resumed.run()
    last = max(checkpoints(tmp_path), key=lambda p: p.stat().st_mtime)
    state = torch.load(last / "trainer_state.pt")
    assert state["optimizer"]["param_groups"][0]["fused"] is None


@pytest.mark.parametrize("fused", [False, True])
def test_lr_factors_are_learning_rates_of_single_parameters(fused: bool):
    factors = {"W_router": 0.1, "omega": 5.0, "b_dec": 0.0, "W_enc": 1.0}
    first, second = (scale_sae() for _ in range(2))
    assert torch.equal(first.W_enc, second.W_enc)
    options: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "fused": fused}
    ours = torch.optim.Adam(first.parameters(), **options)
    apply_lr_factors(ours, first, factors)
    groups = [
        {"params": [p], "lr": 1e-2 * factors.get(name, 1.0)}
        for name, p in second.named_parameters()
    ]
    theirs = torch.optim.Adam(groups, **options)
    generator = torch.Generator().manual_seed(0)
    pairs = list(zip(first.parameters(), second.parameters(), strict=True))
    for _ in range(20):
        for a, b in pairs:
            a.grad = torch.randn(a.shape, generator=generator, dtype=a.dtype)
            b.grad = a.grad.clone()
        ours.step()
        theirs.step()
    for a, b in pairs:
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("others", [None, {}, {"W_router": 0.0}])
def test_a_run_that_goes_on_has_its_lr_factors_unless_it_is_given_others(
    others: dict[str, float] | None, tiny_model: HookedSAETransformer, tmp_path: Path
):
    # In its own units to the end: nothing to fold into the weights.
    cfg = ScaleTrainingSAEConfig(d_in=32, d_sae=64, k=4, num_experts=4)
    frozen = {"b_router": 0.0}
    runner = make_runner(tiny_model, tmp_path, lr_factors=frozen, sae=cfg)
    start = {n: p.detach().clone() for n, p in runner.sae.named_parameters()}
    at_step(runner, 5, kill)
    with pytest.raises(InterruptedException):
        runner.run()
    before = {n: p.detach().clone() for n, p in runner.sae.named_parameters()}
    assert torch.equal(before["b_router"], start["b_router"])
    assert not torch.equal(before["W_router"], start["W_router"])
    (checkpoint,) = checkpoints(tmp_path)
    resumed = make_runner(
        tiny_model,
        tmp_path,
        lr_factors=others,
        sae=cfg,
        resume_from_checkpoint=str(checkpoint),
    ).run()
    for name in ("b_router", "W_router"):
        stayed = torch.equal(resumed.get_parameter(name), before[name])
        assert stayed == (name in (frozen if others is None else others))


@pytest.mark.parametrize(
    ("lr_factors", "message"),
    [
        (
            {"nonsense": 1.0},
            r"must name parameters of the SAE \(.*\), got \['nonsense'\]",
        ),
        ({"W_router": -0.1}, r"lr_factors\['W_router'\] must be .* got -0\.1"),
        ({"omega": float("nan")}, r"lr_factors\['omega'\] must be .* got nan"),
    ],
)
def test_runner_refuses_lr_factors_before_it_trains(
    lr_factors: dict[str, float],
    message: str,
    tiny_model: HookedSAETransformer,
    tmp_path: Path,
):
    with pytest.raises(ValueError, match=message):
        make_runner(tiny_model, tmp_path, lr_factors=lr_factors)


def test_SAELenss_own_runner_loses_an_interrupted_run(
    tiny_model: HookedSAETransformer, tmp_path: Path
):
    """docs/upstream/interruption.md; once this fails, InterruptibleTrainingRunner can go."""
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    runner = make_runner(
        tiny_model, tmp_path, "topk", kind=LanguageModelSAETrainingRunner
    )
    at_step(runner, 5, kill)
    try:
        with pytest.raises(SafetensorError, match="No such file or directory"):
            runner.run()
    finally:
        # It leaves its own handlers behind, too.
        for number, handler in zip(
            (signal.SIGINT, signal.SIGTERM), handlers, strict=True
        ):
            signal.signal(number, handler)
    assert checkpoints(tmp_path) == []
