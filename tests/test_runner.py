"""Training that is interrupted by signals, in this process."""

import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from helpers import exported, scale_sae
from integration.runs import (
    ARCHITECTURES,
    SHORT,
    make_runner,
    runner_config,
    sae_config,
)
from sae_lens import (
    HookedSAETransformer,
    LanguageModelSAETrainingRunner,
    llm_sae_training_runner,
)
from sae_lens.training._interruption import InterruptedException
from safetensors import SafetensorError
from typing_extensions import override

from sae_lens_scale.runner import InterruptibleTrainingRunner, apply_lr_factors

BATCH = SHORT["train_batch_size_tokens"]
STEPS = 12
SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAES = [*ARCHITECTURES, "topk"]
Make = Callable[..., LanguageModelSAETrainingRunner]


@pytest.fixture
def make(tiny_model: HookedSAETransformer, tmp_path: Path) -> Make:
    """Maker of runners that write into ``tmp_path``."""

    def make(
        architecture: str = "scale",
        kind: type[LanguageModelSAETrainingRunner] = InterruptibleTrainingRunner,
        normalize_activations: str = "expected_average_only_in",
        options: dict[str, Any] | None = None,
        **settings: Any,
    ) -> LanguageModelSAETrainingRunner:
        fields = {
            "training_tokens": STEPS * BATCH,
            "checkpoint_path": str(tmp_path / "checkpoints"),
            **settings,
        }
        sae = sae_config(architecture, normalize_activations=normalize_activations)
        cfg = runner_config(sae, tmp_path / "sae", **fields)
        maker: Any = partial(kind, **(options or {}))
        return make_runner(cfg, tiny_model, runner_class=maker)

    return make


def kill(signal_number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), signal_number)


def at_step(
    runner: LanguageModelSAETrainingRunner,
    step: int | None = None,
    do: Callable[[], None] = kill,
) -> list[int]:
    """Do something in the middle of a training step; returns the steps that begin."""
    steps: list[int] = []

    def count(tensor: torch.Tensor, *, hook: Any) -> None:
        steps.append(len(steps) + 1)
        if len(steps) == step:
            do()

    runner.sae.hook_sae_input.add_hook(count)
    return steps


def interrupted(runner: LanguageModelSAETrainingRunner) -> str:
    """Interrupt a run in its fifth step; the only checkpoint that it leaves."""
    at_step(runner, 5)
    with pytest.raises(InterruptedException):
        runner.run()
    (checkpoint,) = Path(str(runner.cfg.checkpoint_path)).iterdir()
    assert checkpoint.name == str(5 * BATCH)
    return str(checkpoint)


def checkpoints(output: Path) -> list[Path]:
    return sorted(output.glob("checkpoints/*/*"))


@pytest.fixture(autouse=True)
def handlers_are_restored():
    """After any run the handlers are those from before it."""
    before = {s: signal.getsignal(s) for s in SIGNALS}
    yield
    after = {s: signal.getsignal(s) for s in SIGNALS}
    for number, handler in before.items():
        signal.signal(number, handler)
    assert after == before


@pytest.mark.parametrize(
    ("architecture", "signal_number", "step"),
    [
        *((name, number, 5) for name in SAES for number in SIGNALS),
        ("scale", signal.SIGTERM, STEPS),
    ],
)
def test_interrupted_run_continues_where_it_stopped(
    architecture: str, signal_number: int, step: int, make: Make, tmp_path: Path
):
    runner = make(architecture)
    steps = at_step(runner, step, lambda: kill(signal_number))
    with pytest.raises(InterruptedException) as stop:
        runner.run()
    # The step in which the signal came is the last, and is finished.
    assert len(steps) == step
    (checkpoint,) = checkpoints(tmp_path)
    assert checkpoint.name == str(step * BATCH)
    assert str(stop.value) == f"resume_from_checkpoint {checkpoint} goes on from here"
    assert not (tmp_path / "sae").exists()

    resumed = make(architecture, resume_from_checkpoint=str(checkpoint))
    steps = at_step(resumed)
    resumed.run()
    assert len(steps) == STEPS - step
    assert (tmp_path / "sae" / "sae_weights.safetensors").exists()


def kill_twice() -> None:
    kill(signal.SIGINT)
    kill(signal.SIGTERM)


def fail() -> None:
    raise ZeroDivisionError("in a step")


@pytest.mark.parametrize(
    ("do", "error", "message"),
    [
        (kill_twice, InterruptedException, "^no checkpoint was saved$"),
        (fail, ZeroDivisionError, "in a step"),
    ],
)
def test_second_signals_and_errors_stop_at_once_without_a_checkpoint(
    do: Callable[[], None],
    error: type[Exception],
    message: str,
    make: Make,
    tmp_path: Path,
):
    runner = make()
    at_step(runner, 5, do)
    with pytest.raises(error, match=message):
        runner.run()
    assert checkpoints(tmp_path) == []


def test_signal_before_the_first_step_stops_at_once(
    make: Make, tiny_model: HookedSAETransformer, tmp_path: Path
):
    runner = make()
    # The store runs the language model to estimate the activations' norm.
    steps = at_step(runner)
    signals = iter([signal.SIGTERM])

    def kill_once(tensor: torch.Tensor, hook: Any) -> None:
        for number in signals:
            kill(number)

    with (
        tiny_model.hooks([("hook_embed", kill_once)]),
        pytest.raises(InterruptedException, match="^no checkpoint was saved$"),
    ):
        runner.run()
    assert (steps, checkpoints(tmp_path)) == ([], [])


def test_without_a_checkpoint_path_nothing_is_saved_and_the_text_says_so(
    make: Make, tmp_path: Path
):
    runner = make(checkpoint_path=None)
    steps = at_step(runner, 5)
    with pytest.raises(InterruptedException, match="checkpoint_path is not set"):
        runner.run()
    assert steps[-1] == 5
    assert list(tmp_path.iterdir()) == []


def test_run_with_prefetching_is_interrupted_too(make: Make):
    interrupted(make(prefetch_llm_batches=True))


def test_interrupted_runner_can_run_again(make: Make, tmp_path: Path):
    runner = make(n_checkpoints=1)
    at_step(runner, 3)
    with pytest.raises(InterruptedException):
        runner.run()
    runner.run()
    assert (tmp_path / "sae" / "sae_weights.safetensors").exists()


def test_signal_while_the_result_is_saved_does_not_cost_it(make: Make, tmp_path: Path):
    class Interrupted(InterruptibleTrainingRunner):
        @override
        def save_checkpoint(self, checkpoint_path: Path | None) -> None:
            kill()
            super().save_checkpoint(checkpoint_path)

    make(kind=Interrupted, save_final_checkpoint=True).run()
    assert [path.name for path in checkpoints(tmp_path)] == [f"final_{STEPS * BATCH}"]
    assert (tmp_path / "sae" / "sae_weights.safetensors").exists()


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_while_the_SAE_is_saved_waits_for_that(
    number: int, make: Make, tmp_path: Path
):
    class Stopped(Exception):
        pass

    def stop(*_: Any) -> None:
        raise Stopped

    runner = make()
    save = runner.sae.save_inference_model
    killing = Mock(side_effect=lambda path: kill(number) or save(path))
    runner.sae.save_inference_model = killing
    before = signal.signal(number, stop)
    try:
        with pytest.raises(Stopped):
            runner.run()
    finally:
        signal.signal(number, before)
    assert {file.name for file in (tmp_path / "sae").iterdir()} == {
        "cfg.json",
        "runner_cfg.json",
        "sae_weights.safetensors",
        "sparsity.safetensors",
    }


def test_a_checkpoint_that_is_not_finished_does_not_lose_its_lr_factors(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    save = Mock(side_effect=OSError("no space"))
    monkeypatch.setattr(LanguageModelSAETrainingRunner, "save_checkpoint", save)
    with pytest.raises(OSError, match="no space"):
        make(n_checkpoints=1, options={"lr_factors": {"b_enc": 0.0}}).run()
    (checkpoint,) = checkpoints(tmp_path)
    assert (checkpoint / "lr_factors.json").exists()
    # Its text says that it lacks a file.
    with pytest.raises(FileNotFoundError, match="resume_from_checkpoint: there is no"):
        make(resume_from_checkpoint=str(checkpoint))


def fused_at_the_end(runner: LanguageModelSAETrainingRunner) -> bool | None:
    """Run, and say how the last checkpoint's optimizer was set."""
    runner.run()
    folders = Path(str(runner.cfg.checkpoint_path)).iterdir()
    last = max(folders, key=lambda folder: folder.stat().st_mtime_ns)
    state = torch.load(last / "trainer_state.pt")
    return state["optimizer"]["param_groups"][0]["fused"]


@pytest.mark.parametrize("architecture", SAES)
def test_fused_optimizer_trains_the_same_up_to_rounding(architecture: str, make: Make):
    saes = []
    for fused in (True, None):
        options = {"fused_optimizer": bool(fused)}
        runner = make(architecture, n_checkpoints=1, options=options)
        assert fused_at_the_end(runner) is fused
        saes.append(runner.sae)
    for name, parameter in saes[0].named_parameters():
        want = saes[1].get_parameter(name)
        torch.testing.assert_close(parameter, want, atol=1e-5, rtol=1e-5)


def test_a_resumed_run_chooses_its_optimizer_anew(make: Make):
    checkpoint = interrupted(make(options={"fused_optimizer": True}))
    resumed = make(resume_from_checkpoint=checkpoint, n_checkpoints=1)
    assert fused_at_the_end(resumed) is None


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
    others: dict[str, float] | None, make: Make
):
    # In its own units to the end: nothing to fold into the weights.
    make = partial(make, normalize_activations="none")
    frozen = {"b_enc": 0.0}
    runner = make(options={"lr_factors": frozen})
    start = {n: p.detach().clone() for n, p in runner.sae.named_parameters()}
    checkpoint = interrupted(runner)
    before = {n: p.detach().clone() for n, p in runner.sae.named_parameters()}
    assert torch.equal(before["b_enc"], start["b_enc"])
    assert not torch.equal(before["W_router"], start["W_router"])
    options = {"lr_factors": others}
    resumed = make(options=options, resume_from_checkpoint=checkpoint).run()
    for name in ("b_enc", "W_router"):
        stayed = torch.equal(resumed.get_parameter(name), before[name])
        assert stayed == (name in (frozen if others is None else others))


NEW_RUN = "from_pretrained_path begins another run from its weights"


@pytest.mark.parametrize(
    ("change", "before", "now"),
    [
        # Its schedule has an end, after which the rate is 0.
        ({"training_tokens": 24 * BATCH}, 12 * BATCH, 24 * BATCH),
        ({"train_batch_size_tokens": 128}, BATCH, 128),
        ({"lr": 1e-3}, 5e-3, 1e-3),
        ({"lr_decay_steps": 3}, 2, 3),
        ({"lr_warm_up_steps": 1}, 0, 1),
        ({"lr_scheduler_name": "cosineannealing"}, "constant", "cosineannealing"),
        ({"adam_beta1": 0.5}, 0.9, 0.5),
        ({"normalize_activations": "none"}, "expected_average_only_in", "none"),
    ],
)
def test_a_run_does_not_go_on_with_settings_that_would_be_ignored(
    change: dict[str, Any], before: Any, now: Any, make: Make
):
    make = partial(make, lr_decay_steps=2)
    checkpoint = interrupted(make())
    (name,) = change
    message = f"{name} must be {before!r}, as in {checkpoint}, whose run goes on, got "
    with pytest.raises(ValueError, match=f"^{message}{now!r}; {NEW_RUN}$"):
        make(resume_from_checkpoint=checkpoint, **change)


def test_a_run_whose_rate_is_constant_may_become_longer(make: Make):
    checkpoint = interrupted(make())
    longer = make(training_tokens=20 * BATCH, resume_from_checkpoint=checkpoint)
    steps = at_step(longer)
    longer.run()
    assert len(steps) == 20 - 5


def test_settings_that_the_schedule_ignores_may_change(make: Make):
    checkpoint = interrupted(make(lr_decay_steps=2))
    change: dict[str, Any] = {"lr_end": 1e-4, "n_restart_cycles": 3}
    make(lr_decay_steps=2, resume_from_checkpoint=checkpoint, **change)


def test_a_run_from_another_SAEs_weights_goes_on(make: Make, tmp_path: Path):
    make().run()
    # An export, whose scale is folded in; the config's own SAE is not trained.
    pretrained = {"from_pretrained_path": str(tmp_path / "sae")}
    checkpoint = interrupted(make(**pretrained))
    resumed = make(**pretrained, resume_from_checkpoint=checkpoint)
    steps = at_step(resumed)
    resumed.run()
    assert len(steps) == STEPS - 5
    # SAELens would train another SAE there.
    with pytest.raises(ValueError, match="^normalize_activations must be 'none', as"):
        make(resume_from_checkpoint=checkpoint)


def test_settings_of_what_a_runner_is_given_do_not_matter(
    tiny_model: HookedSAETransformer,
):
    cfg = runner_config(
        sae_config("scale", normalize_activations="none"),
        llm_device="meta",
        from_pretrained_path="nowhere",
        n_batches_for_norm_estimate=0,
    )
    sae = scale_sae(d_in=32)
    runner = make_runner(
        cfg, tiny_model, override_sae=sae, runner_class=InterruptibleTrainingRunner
    )
    assert runner.sae is sae


def test_a_run_does_not_go_on_after_its_end(make: Make, tmp_path: Path):
    make(save_final_checkpoint=True).run()
    (final,) = checkpoints(tmp_path)
    # Its weights are those for raw activations; the scale would be estimated anew.
    with pytest.raises(
        ValueError, match="^normalize_activations must be 'none', as in"
    ):
        make(resume_from_checkpoint=str(final), training_tokens=20 * BATCH)


def test_a_folder_that_is_no_checkpoint_is_refused(make: Make):
    checkpoint = Path(interrupted(make()))
    with pytest.raises(FileNotFoundError, match="resume_from_checkpoint: there is no"):
        make(resume_from_checkpoint=str(checkpoint.parent))
    for content, message in (
        ("{", "is not JSON"),
        ("[]", r"must hold settings, got \[\]"),
    ):
        (checkpoint / "runner_cfg.json").write_text(content)
        with pytest.raises(ValueError, match=f"runner_cfg.json {message}"):
            make(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"training_tokens": 0}, "^training_tokens must be positive, got 0"),
        (
            {"store_batch_size_prompts": -1},
            "^store_batch_size_prompts must be positive",
        ),
        ({"n_batches_for_norm_estimate": 0}, "^n_batches_for_norm_estimate must be"),
        ({"feature_sampling_window": 0}, "^feature_sampling_window must be positive"),
        # Prompts of nothing but the BOS.
        (
            {"context_size": 1},
            "^context_size must be at least 2, with prepend_bos=True",
        ),
        ({"n_batches_in_buffer": 7}, "hold train_batch_size_tokens=256, got 7"),
        ({"activations_mixing_fraction": 1.5}, "^activations_mixing_fraction must be"),
        ({"lr": float("nan")}, "^lr must be positive and finite, got nan"),
        ({"lr": "fast", "lr_end": 0.1}, "^lr must be positive and finite, got 'fast'"),
        ({"adam_beta1": 1.5}, "adam_beta1=1.5.*Invalid beta parameter"),
        ({"lr_scheduler_name": "cosin"}, "lr_scheduler_name='cosin'.*Unsupported"),
        (
            {
                "lr_scheduler_name": "cosineannealingwarmrestarts",
                "n_restart_cycles": 0,
            },
            "n_restart_cycles=0.*zero",
        ),
        ({"dtype": "int8"}, "^Invalid dtype: int8"),
        ({"act_store_device": "meta"}, "^act_store_device 'meta' cannot be used"),
        (
            {"use_cached_activations": True, "cached_activations_path": "nowhere"},
            "^cached_activations_path: nowhere is no folder",
        ),
        ({"from_pretrained_path": "nowhere"}, "^from_pretrained_path: there is no now"),
        ({"resume_from_checkpoint": "nowhere"}, "^resume_from_checkpoint: there is no"),
        ({"output_path": "{file}/sae"}, "^output_path: {file} is no folder"),
    ],
)
def test_wrong_settings_are_refused_before_the_model_is_loaded(
    settings: dict[str, Any],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    file = tmp_path / "file"
    file.touch()
    load = Mock()
    monkeypatch.setattr(llm_sae_training_runner, "load_model", load)
    settings = {
        name: value.format(file=file) if isinstance(value, str) else value
        for name, value in settings.items()
    }
    with pytest.raises(
        (ValueError, TypeError, OSError), match=message.format(file=file)
    ):
        sae = sae_config("scale", normalize_activations="expected_average_only_in")
        InterruptibleTrainingRunner(runner_config(sae, **settings))
    assert not load.called


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hook_name": "blocks.9.hook_resid_post"}, "^tiny has no hook 'blocks.9"),
        (
            {"hook_name": "blocks.0.mlp.hook_post"},
            "^the SAE must be as wide as .* 64, got 32",
        ),
        ({"hook_head_index": 4}, "^hook_head_index must be one of the 0 heads"),
        ({"context_size": 129}, "^context_size must be at most the 128 tokens"),
        ({"model_kwargs": {"nonsense": 1}}, "^model_kwargs .* do not suit tiny: "),
    ],
)
def test_what_does_not_suit_the_model_is_refused_before_training(
    settings: dict[str, Any], message: str, make: Make
):
    with pytest.raises(ValueError, match=message):
        make(**settings)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["hello"], "^override_dataset must hold a prompt of 32 tokens at least"),
        ([None, "hello"], "^override_dataset must hold a prompt of 32 tokens"),
        ([], "^override_dataset must not be empty"),
    ],
)
def test_a_text_without_a_prompt_is_refused_before_training(
    texts: list[str | None], message: str, tiny_model: HookedSAETransformer
):
    rows = [{"text": text} for text in texts]
    stream = IterableDataset.from_generator(lambda: iter(rows))
    for dataset in (Dataset.from_dict({"text": texts}), stream):
        with pytest.raises(ValueError, match=message):
            InterruptibleTrainingRunner(
                runner_config(sae_config("scale")), dataset, override_model=tiny_model
            )


@pytest.mark.parametrize(
    "change",
    [
        {"exclude_special_tokens": list(range(10**5))},
        # Nothing but the BOS is read.
        {"exclude_special_tokens": True, "seqpos_slice": (0, 1)},
    ],
)
def test_a_text_that_leaves_no_tokens_is_refused(change: dict[str, Any], make: Make):
    with pytest.raises(ValueError, match="^exclude_special_tokens must leave tokens"):
        make(**change, train_batch_size_tokens=16)


def test_what_a_runner_is_given_must_be_of_the_right_kind(
    tiny_model: HookedSAETransformer, tmp_path: Path
):
    runner: Any = InterruptibleTrainingRunner
    cfg = runner_config(sae_config("scale"))
    rows = Dataset.from_dict({"text": ["text"]})
    splits = DatasetDict({"train": rows})
    for given, message in (
        ({"override_dataset": splits}, r"override_dataset must .* \['train'\]"),
        ({"override_sae": exported(scale_sae(), tmp_path)}, "override_sae must be a"),
        ({"override_sae": scale_sae()}, "d_in must be 10, as of override_sae, got 32"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            runner(
                cfg, **{"override_dataset": rows, **given}, override_model=tiny_model
            )


@pytest.mark.parametrize(
    ("lr_factors", "message"),
    [
        (0.1, "must be factors by name of the parameter, got 0.1"),
        ({"b_enc": "0.1"}, r"lr_factors\['b_enc'\] must be .* got '0\.1'"),
        (
            {"nonsense": 1.0},
            r"must name parameters of the SAE \(.*\), got \['nonsense'\]",
        ),
        ({"W_router": -0.1}, r"lr_factors\['W_router'\] must be .* got -0\.1"),
        ({"omega": float("nan")}, r"lr_factors\['omega'\] must be .* got nan"),
    ],
)
def test_runner_refuses_lr_factors_before_it_trains(
    lr_factors: Any, message: str, make: Make
):
    with pytest.raises(ValueError, match=message):
        make(options={"lr_factors": lr_factors})


def test_wrong_arguments_and_a_lack_of_memory_are_not_blamed_on_the_names(
    tiny_model: HookedSAETransformer, monkeypatch: pytest.MonkeyPatch
):
    runner: Any = InterruptibleTrainingRunner
    cfg = runner_config(sae_config("scale"), model_name="gpt2", dataset_path="text")
    with pytest.raises(TypeError, match="'cfg'"):
        runner()
    with pytest.raises(TypeError, match="'nonsense'"):
        runner(cfg, nonsense=1)
    without_text = Dataset.from_dict({"body": ["no text"]})
    with pytest.raises(ValueError, match="^Dataset must have"):
        runner(cfg, without_text, override_model=tiny_model)
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory")):
        load = Mock(side_effect=error)
        monkeypatch.setattr(llm_sae_training_runner, "load_model", load)
        with pytest.raises(type(error)):
            runner(cfg)


def test_SAELenss_own_runner_loses_an_interrupted_run(make: Make, tmp_path: Path):
    """docs/upstream/interruption.md; once this fails, InterruptibleTrainingRunner can go."""
    handlers = {s: signal.getsignal(s) for s in SIGNALS}
    runner = make("topk", kind=LanguageModelSAETrainingRunner)
    at_step(runner, 5)
    try:
        with pytest.raises(SafetensorError, match="No such file or directory"):
            runner.run()
    finally:
        # It leaves its own handlers behind, too.
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert checkpoints(tmp_path) == []
