"""Loss recovered of finished runs: the language model is loaded once for all of them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path

import torch
from datasets import Dataset, IterableDataset
from sae_lens.saes.sae import SAE
from tqdm.auto import tqdm

from sae_lens_scale.analysis.corpus import excluded_ids
from sae_lens_scale.analysis.evaluation import LossRecovered, loss_recovered
from sae_lens_scale.loading.language_model import load_language_model
from sae_lens_scale.upstream import HookedSAETransformer

from .activations import CacheSettings, Split, SplitSettings, text_hash
from .caching import token_store
from .records import RunRecord, read_records
from .text import load_text


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
    Add the loss recovered to the records that lack it and have their weights
    (``keep_weights``).

    Each record is written as soon as it is measured, so that an interruption costs one SAE's
    work.

    Args:
        output: Folder of the records.
        settings: Settings of the model, hook and texts, as they were cached.
        model: The language model, by default loaded by its name.
        texts: The held-out texts, likewise.
        contexts: Number of contexts of each text to read.
        prompts_per_batch: Contexts that the model reads at once.

    Returns:
        The records that were measured; ``measures["loss_recovered"]`` has a result for
        each text by its name, and how many contexts were read.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If a text is too short, or not the one that other records of the folder
            were evaluated on; if a run's activations were of other settings, or its
            held-out text of other documents; or as :func:`.loss_recovered` does.
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
    tokens: dict[Split, Sequence[torch.Tensor]] = {}
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
        tokens[name] = torch.stack(rows).split(prompts_per_batch)
    for record in tqdm(pending, desc="Loss recovered", unit="SAE"):
        sae = SAE.load_from_disk(Path(output, record.name), device=device)
        results: dict[Split, LossRecovered] = {
            name: loss_recovered(model, sae, of) for name, of in tokens.items()
        }
        _require_loss_of(finished, settings, results)
        record.measures["loss_recovered"] = {
            "contexts": contexts,
            **{name: asdict(result) for name, result in results.items()},
        }
        record.write(output)
    return pending


def _require_loss_of(
    records: Sequence[RunRecord],
    settings: CacheSettings,
    results: dict[Split, LossRecovered],
) -> None:
    """Refuse tokens other than those that the records were evaluated on."""
    for record in records:
        for name, result in results.items():
            known = record.measures["loss_recovered"].get(name)
            # Another CPU shows in the fifth decimal, other documents in the first or second.
            if known and abs(known["without_sae"] - result.without_sae) >= 1e-3:
                split = settings.splits()[name]
                raise ValueError(
                    f"{record.name} was evaluated on another text than the {split.text} "
                    f"({split.text_split}) of today: use another folder, or the packages "
                    "that were installed then"
                )


def _require_same_settings(record: RunRecord, settings: CacheSettings) -> None:
    known = record.cache or {}
    for name, value in asdict(settings).items():
        # SAEs are not evaluated on the text that they train on.
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
    """Refuse documents other than those on which the error of a run was measured."""
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
