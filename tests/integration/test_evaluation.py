"""SAELens's evaluation of our SAEs agrees with a computation by hand."""

import copy
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from helpers import small_corpus, step_input
from integration.runs import (
    ARCHITECTURES,
    HOOK,
    NORMALIZED,
    both_architectures,
    exported,
    new_sae,
)
from sae_lens import SAE, HookedSAETransformer, TrainingSAE
from sae_lens.evals import get_eval_everything_config, run_evals
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.util import get_special_token_ids

PROMPTS, CONTEXT, BATCHES = 2, 16, 2


class Evaluation(NamedTuple):
    """Result of run_evals, groups of metrics joined."""

    metrics: dict[str, float]
    features: dict[str, list[float]]


def make_sae(
    architecture: str,
    model: Any,
    hook: str = HOOK,
    scaler: ActivationScaler | None = None,
    **overrides: Any,
) -> TrainingSAE[Any]:
    """A training SAE, a little trained on the activations at a hook."""
    sae: Any = new_sae(architecture, hook, **overrides)
    x = raw_activations(sae, model).flatten(0, 1)
    sae.initialize_from_activations(x)
    if scaler is not None:
        x = scaler.scale(x)
    if architecture == "scale":
        sae.omega.data.normal_(std=0.3)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
    with torch.enable_grad():
        for _ in range(60):
            optimizer.zero_grad()
            sae.training_forward_pass(step_input(x)).loss.backward()
            optimizer.step()
    sae.b_enc.data[::7] = -1_000  # latents that never fire
    return sae


def make_store(sae: SAE[Any], model: Any, **kwargs: Any) -> ActivationsStore:
    return ActivationsStore.from_sae(
        model, sae, small_corpus(), store_batch_size_prompts=PROMPTS, **kwargs
    )


def raw_activations(sae: SAE[Any], model: Any) -> torch.Tensor:
    store = make_store(sae, model)
    return store.get_activations(store.get_batch_tokens(16))


def evaluate(
    sae: SAE[Any],
    model: Any,
    scaler: ActivationScaler | None = None,
    **kwargs: Any,
) -> Evaluation:
    groups, features = run_evals(
        sae,
        make_store(sae, model),
        model,
        scaler or ActivationScaler(),
        get_eval_everything_config(PROMPTS, BATCHES, BATCHES),
        **kwargs,
    )
    metrics = {name: v for group in groups.values() for name, v in group.items()}
    return Evaluation(metrics, features)


def batches(sae: SAE[Any], model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens that run_evals takes for reconstruction, and for sparsity."""
    store = make_store(sae, model)
    tokens = [store.get_batch_tokens() for _ in range(2 * BATCHES)]
    return torch.cat(tokens[:BATCHES]), torch.cat(tokens[BATCHES:])


def assert_same_metrics(
    # Scores are quotients of small differences of float32 losses, which CPUs round differently.
    actual: Evaluation,
    expected: Evaluation,
    rtol: float = 5e-4,
    atol: float = 1e-5,
) -> None:
    assert actual.metrics == pytest.approx(expected.metrics, rel=rtol, abs=atol)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def training_sae(
    request: pytest.FixtureRequest, tiny_model: HookedSAETransformer
) -> TrainingSAE[Any]:
    return make_sae(request.param, tiny_model)


@pytest.fixture(scope="module")
def inference_sae(
    training_sae: TrainingSAE[Any], tmp_path_factory: pytest.TempPathFactory
) -> SAE[Any]:
    return exported(training_sae, tmp_path_factory.mktemp("sae"))


@pytest.fixture(params=["training", "inference"])
def sae(
    request: pytest.FixtureRequest,
    training_sae: TrainingSAE[Any],
    inference_sae: SAE[Any],
) -> SAE[Any]:
    return training_sae if request.param == "training" else inference_sae


@torch.no_grad()
@pytest.mark.parametrize("exclude", [True, False, [28, 30]])
def test_every_metric_is_what_a_computation_by_hand_gives(
    sae: SAE[Any], tiny_model: HookedSAETransformer, exclude: bool | list[int]
):
    model: Any = tiny_model
    got = evaluate(sae, model, exclude_special_tokens=exclude)
    ids = get_special_token_ids(model.tokenizer) if exclude is True else exclude or []
    tokens, tokens_2 = batches(sae, model)

    kept = ~torch.isin(tokens, torch.tensor(ids))
    assert kept.all() == (exclude is False)
    runs: dict[str, Any] = {
        "without_sae": model(tokens),
        "with_sae": model.run_with_saes(
            tokens, saes=[sae], exclude_special_tokens=exclude
        ),
        "with_ablation": model.run_with_hooks(
            tokens, fwd_hooks=[(HOOK, lambda x, hook: torch.zeros_like(x))]
        ),
    }
    clean = runs["without_sae"].log_softmax(-1)
    want: dict[str, float] = {}
    for name, logits in runs.items():
        ce = model.loss_fn(logits, tokens, per_token=True)[kept[:, :-1]].mean()
        want[f"ce_loss_{name}"] = ce.item()
        kl = (clean.exp() * (clean - logits.log_softmax(-1))).sum(-1)[kept].mean()
        want[f"kl_div_{name}"] = kl.item()
    want.pop("kl_div_without_sae")
    want["kl_div_score"] = 1 - want["kl_div_with_sae"] / want["kl_div_with_ablation"]
    lost = want["ce_loss_with_ablation"] - want["ce_loss_with_sae"]
    want["ce_loss_score"] = lost / (
        want["ce_loss_with_ablation"] - want["ce_loss_without_sae"]
    )

    kept = ~torch.isin(tokens_2, torch.tensor(ids))
    x = model.run_with_cache(tokens_2, names_filter=HOOK)[1][HOOK]
    acts, out, x = sae.encode(x)[kept], sae(x)[kept], x[kept]
    residual = (x - out).pow(2).sum(-1)
    want |= {
        "l0": (acts != 0).sum(-1).float().mean().item(),
        "l1": acts.sum(-1).mean().item(),
        "l2_norm_in": x.norm(dim=-1).mean().item(),
        "l2_norm_out": out.norm(dim=-1).mean().item(),
        "l2_ratio": (out.norm(dim=-1) / x.norm(dim=-1)).mean().item(),
        "mse": residual.mean().item(),
        "explained_variance": 1
        - (residual.mean() / (x - x.mean(0)).pow(2).sum(-1).mean()).item(),
        "cossim": torch.cosine_similarity(x, out, dim=-1).mean().item(),
        "total_tokens_eval_reconstruction": PROMPTS * CONTEXT * BATCHES,
        "total_tokens_eval_sparsity_variance": PROMPTS * CONTEXT * BATCHES,
    }
    # Averages of per-batch values, so not computed over all batches here.
    per_batch = {"relative_reconstruction_bias", "explained_variance_legacy"}
    assert got.metrics.keys() == want.keys() | per_batch
    for name, value in got.metrics.items():
        assert math.isfinite(value)
        if name not in per_batch:
            assert math.isclose(value, want[name], rel_tol=1e-3, abs_tol=1e-5), name
    assert 0.2 < got.metrics["explained_variance"] < 1
    assert 0 < got.metrics["l0"] <= 6

    dense = sae.encode(model.run_with_cache(tokens_2, names_filter=HOOK)[1][HOOK])
    fires = (dense != 0) & kept[..., None]
    prompts = fires.any(1).sum(0)
    density = torch.tensor(got.features["feature_density"])
    torch.testing.assert_close(density, fires.sum((0, 1)) / kept.sum())
    consistency = torch.tensor(got.features["consistent_activation_heuristic"])
    # A latent that fires in no prompt has none.
    assert torch.equal(consistency.isnan(), prompts == 0)
    torch.testing.assert_close(consistency, fires.sum((0, 1)) / prompts, equal_nan=True)
    assert not density.all() and density.any()


@torch.no_grad()
def test_weight_metrics_are_of_the_parameters_and_an_export_has_the_applied_encoder(
    training_sae: TrainingSAE[Any],
    inference_sae: SAE[Any],
    tiny_model: HookedSAETransformer,
):
    def by_hand(W_enc: torch.Tensor, b_enc: torch.Tensor) -> dict[str, torch.Tensor]:
        return {
            "encoder_bias": b_enc,
            "encoder_norm": W_enc.norm(dim=0),
            "encoder_decoder_cosine_sim": torch.cosine_similarity(
                W_enc.T, training_sae.W_dec
            ),
        }

    applied = training_sae.W_enc
    if training_sae.cfg.architecture() == "scale":
        applied = training_sae.effective_W_enc()  # type: ignore[operator]
        assert not torch.allclose(applied, training_sae.W_enc)
    norms = training_sae.W_dec.norm(dim=-1)
    b_enc: Any = training_sae.b_enc
    for sae, want in (
        (training_sae, by_hand(training_sae.W_enc, b_enc)),
        (inference_sae, by_hand(applied * norms, b_enc * norms)),
    ):
        features = evaluate(sae, tiny_model).features
        for name, expected in want.items():
            got = torch.tensor(features[name])
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_training_sae_and_its_export_evaluate_alike_in_either_mode(
    training_sae: TrainingSAE[Any],
    inference_sae: SAE[Any],
    tiny_model: HookedSAETransformer,
):
    first = evaluate(training_sae, tiny_model)
    density = pytest.approx(first.features["feature_density"], abs=1e-6)
    for sae in (training_sae, inference_sae):
        for mode in (True, False):
            again = evaluate(sae.train(mode), tiny_model)
            assert_same_metrics(again, first)
            assert again.features["feature_density"] == density
        sae.train()


@torch.no_grad()
@both_architectures
def test_an_unfolded_training_sae_needs_the_trainers_scaler(
    tiny_model: HookedSAETransformer, tmp_path: Path, architecture: str
):
    # While it trains, the runner hands its scaler to evaluation; its export needs none.
    hook = "blocks.0.hook_resid_pre"
    raw = tiny_model.run_with_cache("Hello world", names_filter=hook)[1][hook]
    scaler = ActivationScaler()
    scaler.estimate_scaling_factor(32, iter([raw]), 1)
    assert scaler.scaling_factor is not None and scaler.scaling_factor > 5
    sae = make_sae(architecture, tiny_model, hook, scaler, **NORMALIZED)
    with_scaler = evaluate(sae, tiny_model, scaler)
    without = evaluate(sae, tiny_model)
    assert with_scaler.metrics["explained_variance"] > 0.2
    assert without.metrics["explained_variance"] < 0
    assert without.metrics["kl_div_with_sae"] > with_scaler.metrics["kl_div_with_sae"]

    folded = copy.deepcopy(sae)
    folded.fold_activation_norm_scaling_factor(scaler.scaling_factor)
    got = evaluate(exported(folded, tmp_path), tiny_model)
    # Decoder norms are part of the activations, so folding takes those to raw units.
    got.metrics["l1"] *= scaler.scaling_factor
    assert_same_metrics(got, with_scaler, rtol=1e-3)


def identity_sae(architecture: str) -> SAE[Any]:
    """An SAE whose experts each reconstruct everything, from x and -x."""
    e = {"scale": 2, "switch": 1}[architecture]
    sae = SAE.from_dict(
        {
            "architecture": architecture,
            "d_in": 32,
            "d_sae": 64 * 4,
            "num_experts": 4,
            "experts_per_token": e,
            "k": 64 * e,
            "gate": "renormalized",
            "metadata": {
                "hook_name": HOOK,
                "context_size": CONTEXT,
                "prepend_bos": True,
            },
        }
    )
    signed = torch.cat([torch.eye(32), -torch.eye(32)]).repeat(4, 1)
    sae.W_dec.data = signed
    sae.W_enc.data = signed.T.contiguous()
    return sae


@both_architectures
def test_an_identity_sae_loses_nothing(
    tiny_model: HookedSAETransformer, architecture: str
):
    metrics = evaluate(identity_sae(architecture), tiny_model).metrics
    for name in ("explained_variance", "cossim", "l2_ratio"):
        assert metrics[name] == pytest.approx(1, abs=1e-6), name
    assert metrics["kl_div_with_sae"] == pytest.approx(0, abs=1e-6)
    for name in ("kl_div_score", "ce_loss_score"):
        assert metrics[name] == pytest.approx(1, abs=1e-3), name
    # Each selected expert shows every coordinate once, with one of its signs.
    assert metrics["l0"] == {"scale": 64, "switch": 32}[architecture]


def test_the_error_term_does_not_enter_the_evaluation(
    inference_sae: SAE[Any], tiny_model: HookedSAETransformer
):
    want = evaluate(inference_sae, tiny_model)
    with_error = copy.deepcopy(inference_sae)
    with pytest.deprecated_call():
        with_error.use_error_term = True
    assert_same_metrics(evaluate(with_error, tiny_model), want, rtol=0, atol=0)


def test_a_bfloat16_sae_evaluates_close_to_its_float32_self(
    training_sae: TrainingSAE[Any],
    inference_sae: SAE[Any],
    tiny_model: HookedSAETransformer,
    tmp_path: Path,
):
    sae = exported(training_sae, tmp_path, dtype="bfloat16")
    assert sae.W_enc.dtype == torch.bfloat16
    got, want = evaluate(sae, tiny_model), evaluate(inference_sae, tiny_model)
    assert_same_metrics(got, want, rtol=0.05, atol=0.01)
    # Different, too, or nothing was in bfloat16.
    assert got.metrics["mse"] != want.metrics["mse"]
    json.dumps(got)


@torch.no_grad()
@both_architectures
def test_attention_outputs_of_all_heads_are_evaluated_as_they_are_spliced(
    tiny_model: HookedSAETransformer, tmp_path: Path, architecture: str
):
    hook = "blocks.0.attn.hook_z"
    trained = make_sae(architecture, tiny_model, hook, reshape_activations="hook_z")
    sae = exported(trained, tmp_path)
    got = evaluate(sae, tiny_model, exclude_special_tokens=False)
    assert sae.hook_z_reshaping_mode
    assert_same_metrics(
        got, evaluate(trained, tiny_model, exclude_special_tokens=False)
    )
    tokens, _ = batches(sae, tiny_model)
    loss = tiny_model.run_with_saes(tokens, saes=[sae], return_type="loss")
    assert got.metrics["ce_loss_with_sae"] == pytest.approx(float(loss), abs=1e-4)  # type: ignore[arg-type]
    assert got.metrics["explained_variance"] > 0.2


@torch.no_grad()
@both_architectures
def test_an_sae_of_one_head_is_evaluated_on_that_head_alone(
    tiny_model: HookedSAETransformer, architecture: str
):
    hook, head = "blocks.0.attn.hook_z", 2
    sizes: dict[str, Any] = {"d_in": 8, "d_sae": 32, "k": 4}
    sae = make_sae(architecture, tiny_model, hook, hook_head_index=head, **sizes)
    metrics = evaluate(sae, tiny_model, exclude_special_tokens=False).metrics
    tokens, _ = batches(sae, tiny_model)

    def replace(z: torch.Tensor, hook: Any) -> torch.Tensor:
        z[:, :, head] = sae(z[:, :, head])
        return z

    loss = tiny_model.run_with_hooks(
        tokens, return_type="loss", fwd_hooks=[(hook, replace)]
    )
    assert metrics["ce_loss_with_sae"] == pytest.approx(float(loss), abs=1e-4)
    assert metrics["ce_loss_with_sae"] != metrics["ce_loss_without_sae"]
    assert metrics["explained_variance"] > 0.2
