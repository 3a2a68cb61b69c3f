"""Loss recovered, against three passes by hand and SAELens's run_evals."""

import copy
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import randomize, small_corpus
from sae_lens import SAE, HookedSAETransformer
from sae_lens.evals import EvalConfig, get_recons_loss, run_evals
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.activations_store import ActivationsStore
from torch.nn.functional import cross_entropy

from sae_lens_scale import ScaleTrainingSAE, ScaleTrainingSAEConfig
from sae_lens_scale.analysis.evaluation import loss_recovered

HOOK = "blocks.0.hook_resid_post"
# SmolLM2's tokenizer: BOS and EOS.
BOS, EOS = 1, 2


@torch.no_grad()
def by_hand(
    model: Any,
    sae: SAE[Any],
    tokens: torch.Tensor,
    excluded: set[int],
    hook: str = HOOK,
) -> dict[str, float]:
    """Three passes, and a loop over the predictions that count."""

    def reconstruct(x: torch.Tensor, hook: Any) -> torch.Tensor:
        new = x.clone()
        for row in range(tokens.shape[0]):
            for i in range(tokens.shape[1]):
                if int(tokens[row, i]) not in excluded:
                    new[row, i] = sae.decode(sae.encode(x[row, i][None]))[0]
        return new

    def ablate(x: torch.Tensor, hook: Any) -> torch.Tensor:
        return x * 0

    found = {}
    passes: Any = (
        ("with_sae", [(hook, reconstruct)]),
        ("without_sae", []),
        ("with_ablation", [(hook, ablate)]),
    )
    for name, fwd_hooks in passes:
        logits = model.run_with_hooks(tokens, fwd_hooks=fwd_hooks)
        losses = [
            cross_entropy(logits[row, i].double(), tokens[row, i + 1]).item()
            for row in range(tokens.shape[0])
            for i in range(tokens.shape[1] - 1)
            if int(tokens[row, i]) not in excluded
        ]
        found[name] = sum(losses) / len(losses)
        found["predictions"] = len(losses)
    lost = found["with_ablation"] - found["with_sae"]
    found["score"] = lost / (found["with_ablation"] - found["without_sae"])
    return found


@pytest.mark.parametrize("architecture", ["scale", "switch", "topk", "standard"])
@pytest.mark.parametrize("exclude", [True, False, [5, 7, 30]])
def test_loss_recovered_is_equation_A2_of_three_passes(
    tiny_model: HookedSAETransformer,
    make_sae: Any,
    make_tokens: Any,
    architecture: str,
    exclude: Any,
):
    sae, tokens = make_sae(architecture), make_tokens()
    tokens[1, 3:6] = torch.tensor([5, 7, 30])
    ids = {BOS, EOS} if exclude is True else set(exclude or [])
    got = loss_recovered(tiny_model, sae, [tokens], exclude_special_tokens=exclude)
    want = by_hand(tiny_model, sae, tokens, ids)
    assert asdict(got) == pytest.approx(want, rel=1e-5)
    assert json.loads(json.dumps(asdict(got))) == asdict(got)
    assert got.with_sae != got.without_sae
    assert not tiny_model.acts_to_saes
    assert all(not point.fwd_hooks for point in tiny_model.hook_dict.values())


def test_batches_of_any_sizes_weigh_every_prediction_the_same(
    tiny_model: HookedSAETransformer, make_sae: Any, make_tokens: Any
):
    sae = make_sae()
    parts = [make_tokens(1), make_tokens(2, rows=1, length=30), make_tokens(3, rows=2)]
    each = [loss_recovered(tiny_model, sae, [part]) for part in parts]
    got = loss_recovered(tiny_model, sae, iter(parts))
    assert got.predictions == sum(one.predictions for one in each)
    assert got.with_sae == pytest.approx(
        sum(one.with_sae * one.predictions for one in each) / got.predictions
    )
    assert loss_recovered(tiny_model, sae, parts, max_batches=1) == each[0]


@pytest.mark.parametrize("architecture", ["scale", "topk"])
def test_a_store_gives_what_run_evals_gives(
    tiny_model: HookedSAETransformer, make_sae: Any, architecture: str
):
    sae = make_sae(architecture)

    def store() -> ActivationsStore:
        return ActivationsStore.from_sae(
            tiny_model, sae, small_corpus(), store_batch_size_prompts=3
        )

    got = loss_recovered(tiny_model, sae, store(), max_batches=4)
    config = EvalConfig(compute_ce_loss=True, n_eval_reconstruction_batches=4)
    groups, _ = run_evals(sae, store(), tiny_model, ActivationScaler(), config)
    want = groups["model_performance_preservation"]
    assert {
        "ce_loss_score": got.score,
        "ce_loss_with_sae": got.with_sae,
        "ce_loss_without_sae": got.without_sae,
        "ce_loss_with_ablation": got.with_ablation,
    } == pytest.approx(want, rel=1e-4)


def test_a_training_SAE_sees_activations_as_its_trainer_scales_them(
    tiny_model: HookedSAETransformer, make_tokens: Any, tmp_path: Path
):
    cfg = ScaleTrainingSAEConfig(
        d_in=32, d_sae=64, num_experts=4, experts_per_token=2, k=6
    )
    trained = ScaleTrainingSAE(cfg)
    randomize(trained)
    trained.cfg.metadata.hook_name = HOOK
    tokens, scaler = make_tokens(), ActivationScaler(scaling_factor=3.0)
    got = loss_recovered(tiny_model, trained, [tokens], activation_scaler=scaler)
    unscaled = loss_recovered(tiny_model, trained, [tokens])
    assert got.with_sae != pytest.approx(unscaled.with_sae, abs=1e-3)
    trained.fold_activation_norm_scaling_factor(3.0)
    trained.save_inference_model(tmp_path)
    folded = loss_recovered(tiny_model, SAE.load_from_disk(tmp_path), [tokens])
    assert asdict(folded) == pytest.approx(asdict(got), rel=1e-4)


def test_all_heads_of_hook_z_are_reconstructed_together(
    tiny_model: HookedSAETransformer, make_sae: Any, make_tokens: Any
):
    sae = make_sae(hook="blocks.0.attn.hook_z", reshape_activations="hook_z")
    tokens = make_tokens()
    got = loss_recovered(tiny_model, sae, [tokens], exclude_special_tokens=False)
    assert sae.hook_z_reshaping_mode
    spliced: Any = tiny_model.run_with_saes(tokens, saes=[sae], return_type="loss")
    assert got.with_sae == pytest.approx(spliced.item(), rel=1e-5)
    with pytest.raises(ValueError, match="shape"):
        loss_recovered(tiny_model, sae, [tokens[0]])
    assert sae.hook_z_reshaping_mode


def test_models_of_all_kinds_are_evaluated(kind: Any, make_sae: Any, make_tokens: Any):
    sae, tokens = make_sae(hook=kind.hook), make_tokens()
    got = loss_recovered(kind.model, sae, [tokens])
    want = by_hand(kind.model, sae, tokens, {BOS, EOS}, kind.own_hook)
    # Of differences in the fourth decimal.
    assert got.score == pytest.approx(want.pop("score"), abs=1e-3)
    assert {name: getattr(got, name) for name in want} == pytest.approx(want, rel=1e-5)
    assert len({got.with_sae, got.without_sae, got.with_ablation}) == 3


def test_one_head_is_replaced_as_in_SAELens_s_evaluation(
    tiny_model: HookedSAETransformer, make_sae: Any, make_tokens: Any
):
    sae, tokens = make_sae(hook="blocks.0.attn.hook_z", d_in=8), make_tokens()
    sae.cfg.metadata.hook_head_index = 2
    got = loss_recovered(tiny_model, sae, [tokens], exclude_special_tokens=[5])
    losses = get_recons_loss(
        sae, tiny_model, ActivationScaler(), tokens, False, True, [5]
    )
    counted = tokens[:, :-1] != 5
    for name in ("with_sae", "without_sae", "with_ablation"):
        want = losses[f"ce_loss_{name}"][counted].mean().item()
        assert getattr(got, name) == pytest.approx(want, rel=1e-5)
    assert got.with_sae != got.with_ablation


@pytest.mark.parametrize("architecture", ["transcoder", "skip_transcoder"])
def test_a_transcoder_replaces_what_it_predicts(
    tiny_model: HookedSAETransformer,
    make_sae: Any,
    make_tokens: Any,
    architecture: str,
):
    source, target = "blocks.0.ln2.hook_normalized", "blocks.0.hook_mlp_out"
    sae = make_sae(architecture, source, d_out=32, apply_b_dec_to_input=False)
    tokens = make_tokens()
    with pytest.raises(ValueError, match="hook_name_out must be .* got None"):
        loss_recovered(tiny_model, sae, [tokens])
    sae.cfg.metadata.hook_name_out = target
    got = loss_recovered(tiny_model, sae, [tokens], exclude_special_tokens=False)
    x = tiny_model.run_with_cache(tokens, names_filter=source)[1][source]
    with torch.no_grad():
        new = sae(x)

    def loss(edit: Any) -> float:
        hooks: Any = [(target, edit)]
        found: Any = tiny_model.run_with_hooks(
            tokens, return_type="loss", fwd_hooks=hooks
        )
        return found.item()

    assert got.with_sae == pytest.approx(loss(lambda x, hook: new), rel=1e-5)
    assert got.with_ablation == pytest.approx(loss(lambda x, hook: 0 * x), rel=1e-5)
    assert got.without_sae == pytest.approx(loss(lambda x, hook: x), rel=1e-5)


def test_heads_of_a_bridge_are_reconstructed_too(
    tiny_llama: Path, make_sae: Any, make_tokens: Any
):
    pytest.importorskip("transformer_lens.model_bridge")
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

    # Anew, because a hook that an SAE was detached from does not separate heads.
    bridge: Any = SAETransformerBridge.boot_transformers(str(tiny_llama))
    sae = make_sae(hook="blocks.0.attn.hook_z", reshape_activations="hook_z")
    tokens = make_tokens()
    got = loss_recovered(bridge, sae, [tokens], exclude_special_tokens=False)

    def reconstruct(z: torch.Tensor, hook: Any) -> torch.Tensor:
        return sae.decode(sae.encode(z))

    with torch.no_grad():
        want = bridge.run_with_hooks(
            tokens,
            return_type="loss",
            fwd_hooks=[("blocks.0.attn.o.hook_in", reconstruct)],
        )
    assert got.with_sae == pytest.approx(want.item(), rel=1e-5)
    assert got.with_sae != got.without_sae


def test_losses_that_are_not_finite_are_refused(
    tiny_model: HookedSAETransformer, make_sae: Any, make_tokens: Any, overflowing: Any
):
    sae, tokens = make_sae(), make_tokens()
    message = r"activations must be finite.* in batch 0, at token \(0, 5\)"
    with (
        tiny_model.hooks(fwd_hooks=[(HOOK, overflowing(5))]),
        pytest.raises(ValueError, match=message),
    ):
        loss_recovered(tiny_model, sae, [tokens])
    # Not counted itself, it spoils what follows.
    with (
        tiny_model.hooks(fwd_hooks=[(HOOK, overflowing(0))]),
        pytest.raises(ValueError, match="the loss with_sae must be finite"),
    ):
        loss_recovered(tiny_model, sae, [tokens])
    sae.b_dec.data[3] = torch.nan
    with pytest.raises(ValueError, match="the loss with_sae must be finite"):
        loss_recovered(tiny_model, sae, [tokens])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": []}, "predict .*got none"),
        ({"tokens": [torch.full((2, 4), BOS)]}, "predict .*got none"),
        ({"tokens": [torch.full((2, 1), 9)]}, "predict .*got none"),
        ({"tokens": [torch.zeros(2, 3)]}, "tokens must be batches .*float32"),
        ({"max_batches": 0}, "max_batches must be .* got 0"),
        ({"hook": None}, "hook_name must be .* got None"),
    ],
)
def test_bad_arguments_are_refused(
    tiny_model: HookedSAETransformer,
    make_sae: Any,
    make_tokens: Any,
    change: dict[str, Any],
    message: str,
):
    arguments = {"tokens": [make_tokens()], "hook": HOOK} | change
    sae = make_sae(hook=arguments.pop("hook"))
    with pytest.raises(ValueError, match=message):
        loss_recovered(tiny_model, sae, **arguments)


def test_a_hook_without_effect_is_refused(
    tiny_model: HookedSAETransformer, make_sae: Any, make_tokens: Any
):
    # The logits are all alike, and do not depend on the tokens before.
    model = copy.deepcopy(tiny_model)
    model.unembed.W_U.data.zero_()
    with pytest.raises(ValueError, match="must change the model's loss"):
        loss_recovered(model, make_sae(), [make_tokens()])


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("blocks.0.hook_mlp_in", None, "hook_name must be .* reaches, got .*_mlp_in'"),
        (HOOK, "blocks.0.hook_mlp_in", "hook_name_out must be .* got .*_mlp_in'"),
        ("blocks.0.hook_mlp_in", HOOK, "hook_name must be .* before .* got .*_mlp_in'"),
        (HOOK, "hook_embed", "hook_name must be .* before hook_embed, got 'blocks.0"),
    ],
)
def test_hooks_that_the_model_does_not_reach_are_refused_on_the_first_batch(
    tiny_model: HookedSAETransformer,
    make_sae: Any,
    make_tokens: Any,
    source: str,
    target: str | None,
    message: str,
):
    sae = make_sae(hook=source)
    sae.cfg.metadata.hook_name_out = target
    batches = iter([make_tokens(), make_tokens(1)])
    with pytest.raises(ValueError, match=message):
        loss_recovered(tiny_model, sae, batches)
    assert len(list(batches)) == 1


def test_the_default_device_does_not_matter(
    tiny_model: HookedSAETransformer, make_sae: Any, make_tokens: Any
):
    sae, tokens = make_sae(), make_tokens()
    with torch.device("meta"):
        got = loss_recovered(tiny_model, sae, [tokens])
    assert got == loss_recovered(tiny_model, sae, [tokens])
