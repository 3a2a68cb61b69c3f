"""
Columns of a frame of runs: their short names, and the places of their values in a record.

A new metric is computed in :mod:`.measures` and has a line here; its figure, if it has one, is a
line of :mod:`.figures`.
"""

from collections.abc import Callable
from typing import NamedTuple

_FVU = "{:.4f}".format
_SHARE = "{:.2%}".format


class Column(NamedTuple):
    """
    A column of a frame of runs.

    Attributes:
        name: Short name. Documents call its table so, with hyphens.
        path: Names that lead to its value in a record, joined by points.
        form: Function that writes a value in that table; None if there is no such table.
    """

    name: str
    path: str
    form: Callable[[float], str] | None = None


COLUMNS = (
    Column("seed", "settings.seed"),
    Column("d_sae", "sae_cfg.d_sae"),
    Column("num_experts", "sae_cfg.num_experts"),
    Column("experts_per_token", "sae_cfg.experts_per_token"),
    Column("feature_scaling", "sae_cfg.feature_scaling"),
    Column("decomposition", "sae_cfg.decomposition"),
    Column("gate", "sae_cfg.gate"),
    Column("mse", "in_domain.mse"),
    Column("mse_other_domain", "other_domain.mse"),
    Column("fvu", "in_domain.fvu", _FVU),
    Column("fvu_other_domain", "other_domain.fvu", _FVU),
    Column("fvu_unseen_text", "unseen_text.fvu", _FVU),
    Column("loss_recovered", "measures.loss_recovered.in_domain.score", _FVU),
    Column(
        "loss_recovered_other_domain",
        "measures.loss_recovered.other_domain.score",
        _FVU,
    ),
    Column("l0", "in_domain.l0"),
    Column("alive", "in_domain.alive", _SHARE),
    Column("redundancy", "measures.redundancy.share_above", _SHARE),
    Column("redundancy_between_experts", "measures.redundancy.between_experts", _SHARE),
    Column("activation_similarity", "measures.activation_similarity.similarity", _FVU),
    Column("intra_expert_similarity", "measures.expert_similarity.intra.mean_cosine"),
    Column("inter_expert_similarity", "measures.expert_similarity.inter.mean_cosine"),
    Column("training_flops", "measures.flops_per_token.training.total"),
    # Runs may have shared the machine with others, which wall time would show.
    Column("cpu_seconds", "seconds.training_cpu", "{:.0f}".format),
    *(
        Column(score, f"measures.synthetic.{score}")
        for score in ("recovered", "mcc", "uniqueness", "precision", "recall", "f1")
    ),
    Column("expert_counts", "measures.expert_usage.counts"),
    Column("overlap_histogram", "measures.overlap_histogram.pairs"),
    Column("scaling_factors", "measures.scaling_factors"),
)
