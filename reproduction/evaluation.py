"""What is measured on finished runs with the language model, loaded once for all."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from sae_lens import HookedSAETransformer
from sae_lens.saes.sae import SAE
from tqdm.auto import tqdm
from transformer_lens.hook_points import HookPoint

from sae_lens_scale.analysis.contexts import excluded_ids
from sae_lens_scale.analysis.evaluation import LossRecovered
from sae_lens_scale.loading.language_model import load_language_model

from .activations import CacheSettings, Split, SplitSettings, text_hash
from .records import RunRecord, read_records
from .text import load_text
from .token_store import token_store


class LossMeter:
    """
    Loss Recovered of many SAEs of one hook on the same tokens.

    The numbers are those of :func:`.loss_recovered`. What does not depend on the SAE is
    computed once, so that each of them costs one forward pass in place of three.

    Args:
        model: The language model.
        hook_name: Hook of the SAEs.
        batches: Token ids, each ``[contexts, tokens]``.

    Raises:
        ValueError: If zeros at the hook do not change the loss.
    """

    def __init__(
        self,
        model: HookedSAETransformer,
        hook_name: str,
        batches: list[torch.Tensor],
    ):
        self._model, self._hook_name = model, hook_name
        self._batches = [batch.to(model.cfg.device) for batch in batches]
        self._special = excluded_ids(model, True).to(model.cfg.device)
        self._predictions = 0
        for batch in self._batches:
            self._predictions += int((~torch.isin(batch[:, :-1], self._special)).sum())
        self._without_sae = self._cross_entropy(lambda x, _: x)
        self._with_ablation = self._cross_entropy(lambda x, _: torch.zeros_like(x))
        if self._with_ablation == self._without_sae:
            raise ValueError(
                f"zeros at {hook_name} must change the model's loss, got "
                f"{self._without_sae} with and without"
            )

    def is_of_text(self, without_sae: float) -> bool:
        """
        Whether a loss is the language model's own on these tokens.

        Args:
            without_sae: The loss.
        """
        # Another CPU shows in the fifth decimal, other documents in the first or second.
        return abs(without_sae - self._without_sae) < 1e-3

    def measure(self, sae: SAE[Any]) -> LossRecovered:
        """
        Splice an SAE in.

        Args:
            sae: An SAE for raw activations of the hook.

        Returns:
            What it costs.
        """

        def replace(x: torch.Tensor, special: torch.Tensor) -> torch.Tensor:
            output = sae(x.to(sae.device)).to(x)
            return torch.where(special.unsqueeze(-1), x, output)

        with_sae = self._cross_entropy(replace)
        lost = self._with_ablation - self._without_sae
        return LossRecovered(
            score=(self._with_ablation - with_sae) / lost,
            with_sae=with_sae,
            without_sae=self._without_sae,
            with_ablation=self._with_ablation,
            predictions=self._predictions,
        )

    @torch.no_grad()
    def _cross_entropy(
        self, replace: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    ) -> float:
        total = 0.0
        for batch in self._batches:
            special = torch.isin(batch, self._special)

            def replace_here(
                x: torch.Tensor, special: torch.Tensor = special, **_: HookPoint
            ) -> torch.Tensor:
                return replace(x, special)

            losses = self._model.run_with_hooks(
                batch,
                return_type="loss",
                loss_per_token=True,
                fwd_hooks=[(self._hook_name, replace_here)],
            )
            total += losses[~special[:, :-1]].double().sum().item()
        return total / self._predictions


def evaluate_records(
    output: str | Path,
    settings: CacheSettings,
    *,
    model: HookedSAETransformer | None = None,
    texts: Mapping[Split, Dataset | IterableDataset] | None = None,
    contexts: int = 64,
    prompts_per_batch: int = 8,
    device: str = "cpu",
) -> list[RunRecord]:
    """
    Add the loss recovered to the records that lack it.

    Runs need their weights (``keep_weights``). Each record is written as soon as it is
    measured, so that an interruption costs one SAE's work.

    Args:
        output: Folder of the records.
        settings: Model, hook and texts, as they were cached.
        model: The language model, by default loaded by its name.
        texts: The held-out texts, likewise.
        contexts: Contexts of each text that are read.
        prompts_per_batch: Contexts that the model reads at once.
        device: Where.

    Returns:
        The records that were measured; ``measures["loss_recovered"]`` has a result for
        each text by its name, and how many contexts were read.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If a text is too short, or not the one that other records of the folder
            were evaluated on; or if a run's activations were of other settings, or its
            held-out text of other documents.
    """
    if contexts < 1:
        raise ValueError(f"contexts must be positive, got {contexts}")
    finished: list[RunRecord] = []
    pending: list[RunRecord] = []
    for record in read_records(output):
        if record.measures.get("loss_recovered", {}).get("contexts") == contexts:
            finished.append(record)
        elif Path(output, record.name).is_dir():
            pending.append(record)
    if not pending:
        return []
    for record in pending:
        _require_same_settings(record, settings)
    model = model or load_language_model(settings.model, device)
    meters: dict[Split, LossMeter] = {}
    for name, split in settings.splits().items():
        if name == "train":
            continue
        text = (texts or {}).get(name) or load_text(split.text, split.text_split)
        store = token_store(model, text, split.hook_name, split.context_size)
        sequences = iter(store.iterable_sequences)
        rows = list(islice(sequences, contexts))
        if len(rows) < contexts:
            raise ValueError(
                f"contexts must be at most the {len(rows)} of {split.text} "
                f"({split.text_split}), got {contexts}"
            )
        _require_text_of(
            pending, name, split, chain(rows, sequences), excluded_ids(model, True)
        )
        batches = torch.stack(rows).split(prompts_per_batch)
        meters[name] = LossMeter(model, split.hook_name, list(batches))
        for record in finished:
            known = record.measures["loss_recovered"].get(name)
            if known and not meters[name].is_of_text(known["without_sae"]):
                raise ValueError(
                    f"{record.name} was evaluated on another text than the {split.text} "
                    f"({split.text_split}) of today: use another folder, or the packages "
                    "that were installed then"
                )
    for record in tqdm(pending, desc="Loss recovered", unit="SAE"):
        sae = SAE.load_from_disk(Path(output, record.name), device=device)
        results = {name: asdict(meter.measure(sae)) for name, meter in meters.items()}
        record.measures["loss_recovered"] = {"contexts": contexts, **results}
        record.write(output)
    return pending


def _require_same_settings(record: RunRecord, settings: CacheSettings) -> None:
    known = record.cache or {}
    for name, value in asdict(settings).items():
        # Nothing is evaluated on what SAEs train on.
        if name != "train_tokens" and known.get(name, value) != value:
            raise ValueError(
                f"the activations of {record.name} were of {name}={known[name]!r}, and it "
                f"cannot be evaluated with {value!r} (--cache {name}=…)"
            )


def _require_text_of(
    records: Sequence[RunRecord],
    name: Split,
    split: SplitSettings,
    sequences: Iterable[torch.Tensor],
    excluded: torch.Tensor,
) -> None:
    """Refuse documents other than those that a run's error was measured on."""
    texts = {r.name: (r.cache or {}).get("texts", {}).get(name) for r in records}
    if not any(texts.values()):
        return
    parts, tokens = [], 0
    for sequence in sequences:
        parts.append(sequence[~torch.isin(sequence, excluded)])
        tokens += len(parts[-1])
        if tokens >= split.tokens:
            break
    found = text_hash(torch.cat(parts)[: split.tokens])
    for run, text in texts.items():
        if text not in (None, found):
            raise ValueError(
                f"{run} was measured on another text ({text}) than the {split.text} "
                f"({split.text_split}) of today ({found}): use the packages that were "
                "installed then, or train in another folder"
            )
