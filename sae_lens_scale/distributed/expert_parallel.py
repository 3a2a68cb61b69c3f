"""SAEs whose experts are shared out among processes, too."""

from abc import ABC
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from sae_lens_scale.saes.mixture.dead_latents import DeadLatents
from sae_lens_scale.saes.mixture.dispatch import Rows
from sae_lens_scale.saes.mixture.extension_points import is_hooked
from sae_lens_scale.saes.mixture.feature_scaling import ExpertScaling
from sae_lens_scale.saes.mixture.learning import DeadWeights
from sae_lens_scale.saes.mixture.routing import Routing
from sae_lens_scale.saes.mixture.stages import (
    AppliedEncoder,
    Chosen,
    Encoding,
    Inputs,
)
from sae_lens_scale.saes.mixture.training import MixtureTrainingSAE

from .data_parallel import DataParallelSAE
from .exchange import OwnedRows, add_rows, send_to_owners
from .ranking import Shortlist, is_among_best, keep, lengths_kept, require_topk

# Numbers of inputs, or of products with all latents, that are made at a time.
_AT_A_TIME = 1 << 24


class _RankedDead(NamedTuple):
    """
    Dead latents of a training step, and how many of them tokens have in its loss.

    Attributes:
        offsets: Positions within each held expert, ``[experts, most_dead]``.
        is_dead: True at positions that hold a dead latent, likewise.
        lengths: Number of each pair's best that its token keeps, ``[pairs, 1]``; None if it
            keeps all.
    """

    offsets: torch.Tensor
    is_dead: torch.Tensor
    lengths: torch.Tensor | None = None


class ExpertParallelSAE(DataParallelSAE, ABC):
    """
    A training SAE that holds some of the experts.

    Tokens travel to the processes that hold their experts, and reconstructions travel back.
    All processes that share out the experts have to call it together, whatever it is asked.
    Latents of ``feature_acts`` in a training step are those of the experts that it holds,
    of the tokens that came: ``[rows, held latents]``.

    Inputs, and products with all latents, of (token, expert) pairs are made for some of the
    pairs at a time: an owner of popular experts may get all tokens.
    """

    # The dead latents of a training step, and what was found of them when it was encoded.
    _dead: DeadLatents | None = None
    _ranked_dead: _RankedDead | None = None

    @property
    @override
    def num_held_experts(self) -> int:
        return len(self.ownership.held(self.ownership.rank))

    @override
    def _held(self, per_expert: torch.Tensor) -> torch.Tensor:
        return per_expert[self.ownership.held(self.ownership.rank)]

    @override
    @torch.no_grad()
    def _of_all_experts(self, held: torch.Tensor) -> torch.Tensor:
        own = self.ownership
        mine = held[own.num_shared if own.rank else 0 :]
        return torch.cat(self.mesh.experts.all_gather(mine, "metrics"))

    @override
    def _require_sizes(self, tensors: Mapping[str, torch.Tensor]) -> None:
        own = self.ownership
        whole = {
            name: torch.empty(own.whole_shape(name, tensor), device="meta")
            for name, tensor in tensors.items()
        }
        super()._require_sizes(whole)

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        require_shardable(self)
        self._dead = self._find_dead(step_input.dead_neuron_mask)
        try:
            return super().training_forward_pass(step_input)
        finally:
            self._dead = self._ranked_dead = None

    @override
    def _find_dead(self, mask: torch.Tensor | None) -> DeadLatents | None:
        if self._dead is not None and self._dead.mask is mask:
            return self._dead
        return super()._find_dead(mask)

    @override
    def _encode(
        self, x: torch.Tensor, runners_up: int = 0, with_all_pre_acts: bool = False
    ) -> Encoding:
        if with_all_pre_acts or is_hooked(self.hook_sae_acts_pre):
            raise ValueError(
                "encode_with_hidden_pre and a hook on hook_sae_acts_pre need pre-activations "
                "that no process has where experts are shared out among processes"
            )
        return super()._encode(x, runners_up)

    @override
    def dispatch(self, inputs: Inputs, routing: Routing) -> Rows:
        rows = super().dispatch(inputs, routing)
        return send_to_owners(rows, self.ownership, self.mesh.experts)

    @override
    @torch.no_grad()
    def choose(
        self, rows: Rows, encoder: AppliedEncoder, sizes: Sequence[int]
    ) -> Chosen:
        assert isinstance(rows, OwnedRows)
        dead = ranked = None
        if self._dead is not None and self._dead.most.read():
            dead = self._held_offsets(self._dead)
            of_token = self.cfg.experts_per_token * dead[0].shape[-1]
            # Otherwise a token keeps all that it has.
            ranked = dead if of_token > self._most_dead else None
        selection = self.selection()
        found, dead_values = [], []
        for places in self._some_at_a_time(rows.pair_places):
            pairs = rows.pairs(places)
            candidates, means = self._candidates(pairs, encoder)
            pre_acts = candidates.with_norms(candidates.pre_acts())
            ranking = selection.rank(pre_acts, pairs.gates.to(pre_acts.dtype))
            # As many on every process, also on one without tokens.
            best = ranking.flatten(1).topk(min(sizes[-1], self.cfg.expert_size))
            products = candidates.products.flatten(1).gather(1, best.indices)
            found.append((best.values, best.indices, products, means))
            if ranked is not None:
                offsets, is_dead = (t[pairs.experts] for t in ranked)
                of_dead = pre_acts.gather(-1, offsets).masked_fill(~is_dead, -torch.inf)
                most = min(self._most_dead, offsets.shape[-1])
                dead_values.append(of_dead.flatten(1).topk(most).values)
        values, offsets, products, means = zip(*found, strict=True)
        shortlists = [Shortlist(torch.cat(values), self.cfg.expert_size, sizes)]
        if ranked is not None:
            candidates = ranked[0].shape[-1]
            shortlists.append(
                Shortlist(torch.cat(dead_values), candidates, (self._most_dead,))
            )
        lengths, *of_dead = lengths_kept(rows.route, shortlists)
        if dead is not None:
            self._ranked_dead = _RankedDead(*dead, *of_dead)
        slots = rows.pair_places % rows.experts.shape[1]
        positions = slots.unsqueeze(-1) * self.cfg.expert_size + torch.cat(offsets)
        selected, products = keep(rows, lengths, positions, torch.cat(products))
        if encoder.omega is None:
            return Chosen(selected, products, None)
        means = rows.of_pairs(torch.cat(means).squeeze(-1))
        return Chosen(selected, products, means)

    def _some_at_a_time(self, of_pairs: torch.Tensor) -> Sequence[torch.Tensor]:
        """Split values of pairs, so that inputs and products of a part are bounded."""
        widest = max(self.cfg.d_in, self.cfg.expert_size)
        return of_pairs.split(max(1, _AT_A_TIME // widest))

    @override
    def combine(self, partial: torch.Tensor, rows: Rows) -> torch.Tensor:
        assert isinstance(rows, OwnedRows)
        return rows.combine(partial)

    @override
    def _combine_together(
        self, partial: Sequence[torch.Tensor], rows: Rows
    ) -> Sequence[torch.Tensor]:
        if len(partial) < 2:
            return super()._combine_together(partial, rows)
        widths = [p.shape[-1] for p in partial]
        return self.combine(torch.cat(list(partial), dim=-1), rows).split(widths, -1)

    @override
    def _partial_dead_recons(
        self, encoding: Encoding, dead: DeadLatents
    ) -> torch.Tensor:
        ranked, rows = self._ranked_dead, encoding.rows
        if dead is not self._dead or ranked is None:
            raise ValueError(
                "dead_neuron_mask must be the training step's where experts are shared out "
                "among processes, got another"
            )
        assert isinstance(rows, OwnedRows)
        weights = self._dead_weights(encoding, ranked.offsets)
        dtype = torch.promote_types(rows.x.dtype, self.W_dec.dtype)
        shape = (len(rows.x), self.W_dec.shape[-1])
        recons = self.W_dec.new_zeros(shape, dtype=dtype)
        parts = self._some_at_a_time(rows.pair_places)
        lengths = [None] * len(parts)
        if ranked.lengths is not None:
            lengths = self._some_at_a_time(ranked.lengths)
        for places, its_lengths in zip(parts, lengths, strict=True):
            arguments = (rows, places, encoding.scaling, ranked, its_lengths, weights)
            if len(parts) == 1:
                part = self._dead_of_pairs(*arguments)
            else:
                # A backward pass of all would need what was made for each.
                part = checkpoint(
                    self._dead_of_pairs,
                    *arguments,
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
            add_rows(recons, rows.pair_rows(places), part)
        return recons

    def _dead_of_pairs(
        self,
        rows: OwnedRows,
        places: torch.Tensor,
        scaling: ExpertScaling | None,
        dead: _RankedDead,
        lengths: torch.Tensor | None,
        weights: DeadWeights,
    ) -> torch.Tensor:
        """Sum of the decoder rows of the strongest dead latents of some pairs, ``[pairs, d_out]``."""
        pairs = rows.pairs(places)
        if scaling is not None:
            of_pairs = (t.flatten().index_select(0, places) for t in scaling)
            scaling = ExpertScaling(*(t.unsqueeze(-1) for t in of_pairs))
        pre_acts = self._dead_pre_acts(pairs, scaling, weights)
        taken = dead.is_dead[pairs.experts]
        if lengths is not None:
            ranking = self._dead_ranking(pairs, pre_acts, weights)
            ranking = ranking.masked_fill(~taken, -torch.inf)
            taken = taken & is_among_best(ranking, lengths.unsqueeze(-1))
        return self._decode_dead(pairs, pre_acts, taken, weights)

    @override
    @torch.no_grad()
    def _feature_acts(self, encoding: Encoding) -> torch.Tensor:
        rows, n = encoding.rows, self.cfg.expert_size
        assert isinstance(rows, OwnedRows)
        route, places = rows.route, rows.pair_places
        # A latent that is masked has activation 0, and may be named twice.
        of_rows = encoding.latents.to_dense(self.num_held_experts * n)
        held = rows.experts.flatten()[places]
        acts = self._by_expert(of_rows)[rows.pair_rows(places), held]
        home = acts.new_empty(len(route.pair_slots), n)
        home[route.pair_slots] = route.pairs_home(acts, "activations")
        experts = encoding.routing.indices
        wide = home.new_zeros(*experts.shape[:-1], self.cfg.num_experts, n)
        index = experts.unsqueeze(-1).expand(*experts.shape, n)
        wide.scatter_(-2, index, home.view(*experts.shape, n))
        return wide.flatten(-2)

    @override
    @torch.no_grad()
    def _decode_dense(self, feature_acts: torch.Tensor) -> torch.Tensor:
        group, own = self.mesh.experts, self.ownership
        N, n, S = self.cfg.num_experts, self.cfg.expert_size, own.num_shared
        experts = feature_acts.view(-1, N, n)
        tokens = group.lengths(feature_acts, "activations")
        parts = []
        for rank in range(group.size):
            part = experts[:, own.held(rank)]
            if rank != own.rank:
                # Shared experts are decoded at home.
                part[:, :S] = 0
            parts.append(part.flatten())
        width = self.num_held_experts * n
        received = group.all_to_all(
            torch.cat(parts),
            [t * width for t in tokens],
            [part.numel() for part in parts],
            "activations",
        )
        recons = super()._decode_dense(received.view(-1, width))
        mine = [len(experts)] * group.size
        home = group.all_to_all(recons, mine, tokens, "reconstructions")
        # A size of -1 would be ambiguous without tokens.
        return home.view(group.size, len(experts), home.shape[-1]).sum(0)


def require_shardable(sae: MixtureTrainingSAE[Any]) -> None:
    """
    Refuse an SAE whose experts cannot be shared out as it is.

    Raises:
        ValueError: If somebody hooks it, or its selection is no TopK of each token.
    """
    require_topk(sae.selection())
    for name, hook in sae.hook_dict.items():
        if is_hooked(hook):
            raise ValueError(
                f"{name} must have no hook where experts are shared out among processes, "
                "none of which sees a whole batch"
            )
