"""The core's seams, each with a second implementation: selection, target, dispatch."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import (
    DEAD,
    X,
    assert_close,
    assert_same_gradients,
    gradients,
    scale_sae,
    step_input,
    subclass,
)
from sae_lens.saes.sae import TrainStepInput
from torch import nn
from typing_extensions import override

from sae_lens_scale import ScaleTrainingSAE
from sae_lens_scale.analysis import activation_similarity
from sae_lens_scale.saes.mixture import selection
from sae_lens_scale.saes.mixture.dead_latents import strongest_dead
from sae_lens_scale.saes.mixture.dispatch import Rows
from sae_lens_scale.saes.mixture.encoding import Inputs
from sae_lens_scale.saes.mixture.routing import Routing
from sae_lens_scale.saes.mixture.selection import SELECTIONS, Selected, Selection

K = 6


def best_of_each_row(ranking: torch.Tensor, counts: Sequence[torch.Tensor]) -> Selected:
    """So many of each row's best as ``counts`` says, one ``[rows]`` for each size."""
    order = ranking.argsort(dim=-1, descending=True)
    start = torch.zeros_like(counts[0])
    positions, masks = [], []
    for count in counts:
        number = torch.arange(int((count - start).max()))
        mask = number < (count - start).unsqueeze(-1)
        column = (start.unsqueeze(-1) + number).clamp(max=ranking.shape[-1] - 1)
        positions.append(order.gather(-1, column))
        masks.append(mask)
        start = count
    return Selected(
        torch.cat(positions, dim=-1),
        tuple(mask.shape[-1] for mask in masks),
        torch.cat(masks, dim=-1),
    )


class BatchTopK(ScaleTrainingSAE):
    """The best k latents a token on average (Bussmann et al. 2024), more for some."""

    @override
    def selection(self) -> Selection:
        gated = SELECTIONS["gated_activations"]
        return replace(gated, select=self.select, per_token=False)

    @staticmethod
    def select(ranking: torch.Tensor, sizes: Sequence[int]) -> Selected:
        flat = ranking.flatten().sort(descending=True).values
        ends = [min(size * len(ranking), len(flat)) for size in sizes]
        return best_of_each_row(
            ranking, [(ranking >= flat[end - 1]).sum(-1) for end in ends]
        )


def batch_topk(sae: ScaleTrainingSAE, x: torch.Tensor, k: int) -> torch.Tensor:
    """Feature activations of BatchTopK, from dense pre-activations."""
    routing = sae.route(x)
    W_enc = sae.W_enc.unflatten(1, (5, 12))
    low = W_enc.mean(-1, keepdim=True)
    assert sae.omega is not None
    W_hat = (low + (1 + sae.omega[:, None]) * (W_enc - low)).flatten(1)
    hidden_pre = ((x - sae.b_dec) @ W_hat + sae.b_enc) * sae.W_dec.norm(dim=-1)
    gates = torch.zeros(len(x), 5, dtype=x.dtype).scatter(
        1, routing.indices, routing.weights
    )
    selected = torch.zeros_like(gates, dtype=torch.bool)
    selected = selected.scatter(1, routing.indices, True).repeat_interleave(12, dim=1)
    acts = hidden_pre * gates.repeat_interleave(12, dim=1)
    candidates = acts.masked_fill(~selected, -torch.inf)
    threshold = candidates.flatten().topk(k * len(x)).values.min()
    return torch.where(candidates >= threshold, acts, 0).relu()


@pytest.mark.parametrize("at_a_time", [1, 1 << 17])
def test_a_selection_over_the_batch_sees_the_whole_batch(
    sparse: bool, at_a_time: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(selection, "_AT_A_TIME", at_a_time)
    plain = scale_sae(
        multi_topk_coefficient=0.5,
        use_sparse_activations=sparse,
        aux_loss_coefficient=0.0,
        load_balance_coefficient=0.0,
    )
    sae = subclass(BatchTopK, plain)
    acts = batch_topk(sae, X, K)
    assert (acts > 0).sum(-1).unique().numel() > 1, "tokens should differ"
    assert_close(sae.encode(X), acts)
    assert_close(sae(X), sae.decode(acts))
    assert_close(sae(X.view(2, 4, 10)).view(8, 10), sae.decode(acts))
    output = sae.training_forward_pass(step_input(X))
    assert_close(output.feature_acts.to_dense(), acts)
    wider = batch_topk(sae, X, 4 * K)
    want = (sae.decode(acts) - X).pow(2).sum(-1).mean()
    want = want + 0.5 * (sae.decode(wider) - X).pow(2).sum(-1).mean()
    assert_close(output.loss, want)
    assert_same_gradients(sae, output.loss, want)


class OnlyRunnersUp(ScaleTrainingSAE):
    """No survivors, as where all of a token's best latents are held elsewhere."""

    @override
    def selection(self) -> Selection:
        return replace(super().selection(), select=self.select)

    @staticmethod
    def select(ranking: torch.Tensor, sizes: Sequence[int]) -> Selected:
        best = ranking.topk(sizes[-1] if len(sizes) > 1 else 0).indices
        return Selected(best, (0, *([sizes[-1]] if len(sizes) > 1 else [])))


def test_runners_up_are_no_survivors_where_there_are_none():
    sae = subclass(OnlyRunnersUp, scale_sae(multi_topk_coefficient=0.5, k=3))
    assert not sae.encode(X).any()
    assert_close(sae(X), sae.b_dec.expand_as(X))
    losses = sae.training_forward_pass(step_input(X)).losses
    assert_close(losses["mse_loss"], (X - sae.b_dec).pow(2).sum(-1).mean())
    assert not torch.isclose(losses["multi_topk_loss"], 0.5 * losses["mse_loss"])


class Transcoder(ScaleTrainingSAE):
    """An SAE that reads activations of width 10 and reconstructs others of width 4."""

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.W_dec = nn.Parameter(torch.randn(60, 4, dtype=torch.float64))
        self.b_dec = nn.Parameter(torch.zeros(4, dtype=torch.float64))

    @override
    def target(self, step_input: TrainStepInput) -> torch.Tensor:
        return outputs_of_a_layer(step_input.sae_in)


def outputs_of_a_layer(x: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.tanh(x @ torch.randn(10, 4, generator=generator, dtype=x.dtype))


def test_a_target_may_be_another_than_the_input_and_of_another_width(sparse: bool):
    cfg = scale_sae(
        apply_b_dec_to_input=False,
        use_sparse_activations=sparse,
        aux_loss_coefficient=0.25,
        multi_topk_coefficient=0.5,
    ).cfg
    torch.manual_seed(0)
    sae = Transcoder(cfg)
    y = outputs_of_a_layer(X)
    assert sae(X).shape == sae.decode(sae.encode(X)).shape == y.shape
    output = sae.training_forward_pass(step_input(X, DEAD))
    assert_close(output.losses["mse_loss"], (sae(X) - y).pow(2).sum(-1).mean())
    # The two best dead latents of a token, half as many as its target is wide.
    acts, hidden_pre = sae.encode_with_hidden_pre(X)
    best = hidden_pre.masked_fill(~DEAD, -torch.inf).topk(2)
    routing = sae.route(X)
    gates = torch.zeros(8, 5, dtype=X.dtype).scatter(
        1, routing.indices, routing.weights
    )
    values = best.values * gates.gather(1, best.indices // 12)
    rows = sae.W_dec / sae.W_dec.norm(dim=-1, keepdim=True)
    recons = (values.unsqueeze(-1) * rows[best.indices]).sum(1)
    errors = (recons - (y - sae(X))).pow(2).sum(-1).mean()
    assert_close(output.losses["auxiliary_reconstruction_loss"], 0.25 * errors)
    again = sae.calculate_aux_loss(step_input(X, DEAD), acts, hidden_pre, sae(X))
    assert_close(again, {name: output.losses[name] for name in again})
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
    for _ in range(100):
        sae.training_forward_pass(step_input(X, DEAD)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = sae.training_forward_pass(step_input(X, DEAD)).losses
    for name in ("mse_loss", "multi_topk_loss", "auxiliary_reconstruction_loss"):
        assert after[name] < 0.1 * output.losses[name]


class OneExpertAtATime(ScaleTrainingSAE):
    """Rows of one expert each: as if each of a token's experts were held elsewhere."""

    @override
    def dispatch(self, inputs: Inputs, routing: Routing) -> Rows:
        rows = super().dispatch(inputs, routing)
        e = self.cfg.experts_per_token
        return replace(
            rows,
            x=rows.x.repeat_interleave(e, dim=0),
            experts=rows.experts.view(-1, 1),
            gates=rows.gates.view(-1, 1),
            shape=torch.Size([*rows.shape, e]),
        )

    @override
    def combine(self, partial: torch.Tensor, rows: Rows) -> torch.Tensor:
        return partial.unflatten(0, (-1, self.cfg.experts_per_token)).sum(1)

    @override
    def selection(self) -> Selection:
        return replace(super().selection(), select=self.select, per_token=False)

    def select(self, ranking: torch.Tensor, sizes: Sequence[int]) -> Selected:
        """The best of a token among all of its rows: a prefix of each."""
        e, candidates = self.cfg.experts_per_token, ranking.shape[-1]
        of_token = ranking.reshape(-1, e * candidates)
        counts = []
        for size in sizes:
            best = of_token.topk(min(size, e * candidates)).indices // candidates
            rows = torch.nn.functional.one_hot(best, e).sum(1)
            counts.append(rows.flatten())
        return best_of_each_row(ranking, counts)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"topk_over": "activations", "gate": "softmax"},
        {"experts_per_token": 4, "num_shared_experts": 1},
        {"rescale_acts_by_decoder_norm": False, "apply_b_dec_to_input": False},
        {"feature_scaling": False},
        {"decomposition": "identity"},
        {"experts_per_token": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("dead_share", [0.0, 0.1, 0.7])
def test_experts_may_be_elsewhere(overrides: dict[str, Any], dead_share: float):
    plain = scale_sae(
        multi_topk_coefficient=0.5, aux_loss_coefficient=0.25, **overrides
    )
    sae = subclass(OneExpertAtATime, plain)
    generator = torch.Generator().manual_seed(4)
    dead = torch.rand(60, generator=generator) < dead_share
    got = sae.training_forward_pass(step_input(X, dead))
    want = plain.training_forward_pass(step_input(X, dead))
    assert_close(got.losses, want.losses)
    assert_close(got.sae_out, want.sae_out)
    assert_close(sae(X), plain(X))
    assert_close(got.feature_acts.to_dense().sum(1), want.feature_acts.to_dense())
    assert_close(gradients(sae, got.loss), gradients(plain, want.loss))


def test_activations_of_experts_that_are_elsewhere_are_those_of_the_token():
    plain = scale_sae()
    sae = subclass(OneExpertAtATime, plain)
    acts = plain.encode(X)
    assert_close(sae.encode(X), acts)
    assert_close(sae.encode_sparse(X).to_dense(60), acts)
    assert activation_similarity(sae, [X]) == activation_similarity(plain, [X])
    assert_close(sae.encode(X.view(2, 4, 10)), acts.view(2, 4, 60))
    watch = [("hook_sae_acts_post", lambda acts, hook: 2 * acts)]
    assert_close(sae.run_with_hooks(X, fwd_hooks=watch), plain.decode(2 * acts))


def test_pre_activations_of_experts_that_are_elsewhere_are_refused():
    sae = subclass(OneExpertAtATime, scale_sae())
    watch = [("hook_sae_acts_pre", lambda pre, hook: pre)]
    for use in (
        lambda: sae.encode_with_hidden_pre(X),
        lambda: sae.run_with_hooks(X, fwd_hooks=watch),
    ):
        with pytest.raises(NotImplementedError, match="dispatch is overridden"):
            use()


class AboveThreshold(ScaleTrainingSAE):
    """A rule of each token alone that keeps more of one than of another."""

    @override
    def selection(self) -> Selection:
        return replace(super().selection(), select=self.select)

    @staticmethod
    def select(ranking: torch.Tensor, sizes: Sequence[int]) -> Selected:
        return best_of_each_row(ranking, [(ranking > 1).sum(-1) for _ in sizes])


def test_a_selection_of_parts_that_differ_is_refused(monkeypatch: pytest.MonkeyPatch):
    sae = subclass(AboveThreshold, scale_sae())
    sae.encode(X)
    monkeypatch.setattr(selection, "_AT_A_TIME", 1)
    with pytest.raises(ValueError, match="per_token=True must keep as many latents"):
        sae.encode(X)


def test_a_masked_position_does_not_hide_the_same_one_kept():
    ranking = torch.tensor([[[3.0, 2.0, 1.0]]])

    def select(ranking: torch.Tensor, sizes: Sequence[int]) -> Selected:
        positions = torch.tensor([[0, 1, 0]])
        return Selected(positions, (3,), torch.tensor([[True, True, False]]))

    everything = torch.ones_like(ranking, dtype=torch.bool)
    rule = replace(SELECTIONS["activations"], select=select, per_token=False)
    taken = strongest_dead(ranking, everything, 2, rule)
    assert taken.tolist() == [[[True, True, False]]]
