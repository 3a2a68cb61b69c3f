"""Refusals of processes, for tests."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from cache.runs import cached_config
from datasets import Dataset
from distributed.runners import make_runner
from distributed.work import mesh_of
from helpers import draw, scale_sae, step_input, subclass
from sae_lens.config import LanguageModelSAERunnerConfig, LoggingConfig

from sae_lens_scale import ScaleTrainingSAE
from sae_lens_scale.distributed.runner import DistributedTrainingRunner
from sae_lens_scale.distributed.sae import distribute
from sae_lens_scale.saes.mixture.selection import SELECTIONS, Selection


class _KeepsTheFirst(ScaleTrainingSAE):
    def selection(self) -> Selection:
        return Selection(
            SELECTIONS["activations"].rank,
            lambda ranking, sizes: SELECTIONS["activations"].select(-ranking, sizes),
            per_token=True,
            meaning="the k smallest",
        )


class _OfTheBatch(ScaleTrainingSAE):
    def selection(self) -> Selection:
        return replace(super().selection(), per_token=False)


class _Decodes(ScaleTrainingSAE):
    def decode(self, feature_acts: torch.Tensor) -> torch.Tensor:
        return super().decode(feature_acts)


class _EncodesWithHiddenPre(ScaleTrainingSAE):
    def encode_with_hidden_pre(
        self, x: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return super().encode_with_hidden_pre(x)


SUBCLASSES = {
    "selection": _KeepsTheFirst,
    "the batch": _OfTheBatch,
    "decode": _Decodes,
    "encode_with_hidden_pre": _EncodesWithHiddenPre,
}


def _message(action: Any) -> str:
    try:
        action()
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def of_hooks(expert_parallel: int) -> list[tuple[str, str, str]]:
    """Each hook point, and the errors for one who hooks it before and after distribute."""
    mesh, step = mesh_of(expert_parallel), step_input(draw(4, 10))
    found = []
    for name in scale_sae().hook_dict:
        before, after = scale_sae(), distribute(scale_sae(), mesh)
        for sae in (before, after):
            sae.hook_dict[name].add_hook(lambda tensor, hook: tensor)
        found.append(
            (
                name,
                _message(lambda sae=before: distribute(sae, mesh)),
                _message(lambda sae=after: sae.training_forward_pass(step)),
            )
        )
    return found


def of_settings(by_rank: list[dict[str, Any]]) -> str:
    """Error of a runner whose settings are others on each process."""
    rank = mesh_of(1).world.rank
    return of_runner("no-such-model", by_rank[rank])


def of_caches(folder: Path) -> str:
    """Error of a runner that reads another cache on each process."""
    cfg = cached_config(folder / str(mesh_of(1).world.rank))
    return _message(lambda: DistributedTrainingRunner(cfg))


def of_saes(expert_parallel: int) -> dict[str, str]:
    """Errors for SAEs whose experts cannot be shared out, and for what these cannot do."""
    mesh = mesh_of(expert_parallel)
    errors = {
        name: _message(lambda c=cls: distribute(subclass(c, scale_sae()), mesh))
        for name, cls in SUBCLASSES.items()
    }
    sae = distribute(scale_sae(), mesh)
    if expert_parallel == 1:
        return errors
    return errors | {
        "a call": _message(lambda: sae.encode_with_hidden_pre(draw(4, 10))),
        "use_sparse_activations": _message(
            lambda: distribute(scale_sae(use_sparse_activations=False), mesh)
        ),
        "num_experts": _message(
            lambda: distribute(
                scale_sae(experts_per_token=4, num_shared_experts=3), mesh
            )
        ),
    }


def of_shared_out(expert_parallel: int) -> list[str]:
    """Errors for an SAE that has been shared out: of another sharing out, and of a runner."""
    mesh, sae = mesh_of(expert_parallel), scale_sae()
    distribute(sae, mesh)
    cfg = LanguageModelSAERunnerConfig(
        sae=sae.cfg, logger=LoggingConfig(log_to_wandb=False), checkpoint_path=None
    )
    return [
        _message(lambda: distribute(sae, mesh)),
        _message(lambda: DistributedTrainingRunner(cfg, override_sae=sae)),
    ]


def of_second_run(model: Path) -> str:
    """Error of a runner that is to run again."""
    text = Dataset.from_dict({"text": [f"{i} " * 30 for i in range(40)]})
    runner = make_runner(model, text, training_tokens=64, n_batches_for_norm_estimate=1)
    runner.run()
    return _message(runner.run)


def of_runner(model: Path | str, overrides: dict[str, Any]) -> str:
    """Error of a runner, with some of its arguments and of its config's fields."""
    rows = overrides.get("rows", 31)
    text = Dataset.from_dict({"text": [f"{i} " * 30 for i in range(rows)]})
    settings: dict[str, Any] = {"override_dataset": text} | overrides
    settings.pop("rows", None)
    return _message(
        lambda: make_runner(model, settings.pop("override_dataset"), **settings)
    )
