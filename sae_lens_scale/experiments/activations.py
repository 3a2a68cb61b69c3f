"""
Activations of a language model, computed once for all the SAEs that train on them.

The model reads a text as in SAELens's own training (its ActivationsStore makes the
contexts), and its activations are written in the order of the text, in shards. Readers map
the shards into memory and mix them anew for each training run, over all tokens.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import count, islice
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset, IterableDataset
from sae_lens import HookedSAETransformer
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.util import extract_stop_at_layer_from_tlens_hook_name
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from sae_lens_scale.analysis.contexts import excluded_ids
from sae_lens_scale.saes.files import replacing_files

from .demo import load_language_model
from .precision import fast_bfloat16
from .text import load_text

Split = Literal["train", "in_domain", "other_domain"]

_MANIFEST = "manifest.json"
_SHARD_POSITIONS = 2**15


@dataclass(frozen=True)
class CacheSettings:
    """
    What decides cached activations.

    Args:
        model (str): "smollm2" or the name of a TransformerLens model.
        hook_name (str): Hook whose activations are cached.
        text (str): What SAEs train on, and in another part of it are evaluated on; a name
            that :func:`.load_text` knows.
        other_text (str | None): Text of another domain to evaluate on, likewise.
        train_tokens (int): Tokens to train on.
        test_tokens (int): Tokens to evaluate on, of the training text's other part.
        other_tokens (int): Tokens to evaluate on, of the other text.
        context_size (int): Tokens per prompt, BOS included.
    """

    model: str = "smollm2"
    hook_name: str = "blocks.8.hook_resid_post"
    text: str = "docstrings"
    other_text: str | None = None
    train_tokens: int = 2_000_000
    test_tokens: int = 100_000
    other_tokens: int = 100_000
    context_size: int = 256

    def __post_init__(self) -> None:
        for name in ("train_tokens", "test_tokens", "other_tokens", "context_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")

    def splits(self) -> dict[Split, "_SplitSettings"]:
        """What is cached, each in a folder of its name."""
        common = (self.model, self.hook_name, self.context_size)
        splits: dict[Split, _SplitSettings] = {
            "train": _SplitSettings(*common, self.text, "train", self.train_tokens),
            "in_domain": _SplitSettings(*common, self.text, "test", self.test_tokens),
        }
        if self.other_text is not None:
            splits["other_domain"] = _SplitSettings(
                *common, self.other_text, "all", self.other_tokens
            )
        return splits


@dataclass(frozen=True)
class _SplitSettings:
    model: str
    hook_name: str
    context_size: int
    text: str
    text_split: Literal["train", "test", "all"]
    tokens: int

    def require_fit(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        for name, value in asdict(self).items():
            if name != "tokens" and manifest[name] != value:
                raise ValueError(
                    f"{folder} holds activations of {name}={manifest[name]!r}, "
                    f"not {value!r}"
                )


class Activations:
    """
    Activations of many tokens, on disk or in memory.

    Args:
        parts: Tensors ``[tokens, d_in]``, which may be memory-mapped.
        tokens: How many tokens there are to read; all by default.

    Raises:
        ValueError: If there are none, or fewer than ``tokens``.
    """

    def __init__(self, parts: Sequence[torch.Tensor], tokens: int | None = None):
        available = sum(map(len, parts))
        if not available or available < (tokens or 0):
            raise ValueError(f"parts must hold {tokens or 1} tokens, got {available}")
        self._parts = list(parts)
        self._ends = torch.tensor([len(part) for part in parts]).cumsum(0)
        self._tokens = available if tokens is None else tokens

    def __len__(self) -> int:
        return self._tokens

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return self._parts[0].shape[-1]

    def to(self, device: str | torch.device) -> "Activations":
        """The same in one piece in a device's memory, where reading costs nothing."""
        parts = [part.to(device) for part in self._parts]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return Activations([whole], len(self))

    def take(self, indices: torch.Tensor) -> torch.Tensor:
        """
        Read tokens.

        Args:
            indices: Which ones, ``[n]``.

        Returns:
            Their activations in float32, ``[n, d_in]``.
        """
        first = self._parts[0]
        if len(self._parts) == 1:
            return first[indices.to(first.device)].float()
        rows = torch.empty(len(indices), self.d_in, dtype=first.dtype)
        part_of = torch.searchsorted(self._ends, indices, right=True)
        for i in part_of.unique().tolist():
            here = (part_of == i).nonzero().squeeze(-1)
            part = self._parts[i]
            rows[here] = part[indices[here] - (self._ends[i] - len(part))]
        return rows.float()

    def sample(self, n: int, seed: int = 0) -> torch.Tensor:
        """
        Tokens chosen at random, the same for the same seed.

        Args:
            n: How many; all, if there are fewer.
            seed: Seed of the choice.

        Returns:
            Their activations in float32, ``[n, d_in]``.
        """
        return self.take(next(self._orders(seed))[:n])

    def batches(self, batch_size: int) -> Iterator[torch.Tensor]:
        """All tokens once, in their order, in float32; the last batch may be smaller."""
        for indices in torch.arange(len(self)).split(batch_size):
            yield self.take(indices)

    def shuffled(self, batch_size: int, seed: int) -> Iterator[torch.Tensor]:
        """
        Batches to train on, without an end: each epoch is mixed anew over all tokens.

        Args:
            batch_size: Tokens per batch.
            seed: Seed of the order.

        Yields:
            ``[batch_size, d_in]`` in float32; what is left of an epoch is left out.

        Raises:
            ValueError: If there are fewer tokens than a batch takes.
        """
        if batch_size > len(self):
            raise ValueError(
                f"batch_size must be at most the {len(self)} tokens, got {batch_size}"
            )
        for order in self._orders(seed):
            whole = len(order) - len(order) % batch_size
            for indices in order[:whole].split(batch_size):
                yield self.take(indices)

    def _orders(self, seed: int) -> Iterator[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield torch.randperm(len(self), generator=generator)


@dataclass
class ActivationCache:
    """
    The activations of an experiment.

    Attributes:
        train: What SAEs train on.
        in_domain: What they are evaluated on: other documents of the same text.
        other_domain: A text of another domain, if there is one.
        settings: What decided them.
        folder: Where they are on disk, if they are.
    """

    train: Activations
    in_domain: Activations
    other_domain: Activations | None = None
    settings: CacheSettings | None = None
    folder: Path | None = None

    @classmethod
    def open(cls, folder: str | Path, settings: CacheSettings) -> "ActivationCache":
        """
        Read what :func:`cache_activations` wrote.

        Args:
            folder: Its folder.
            settings: What is expected there. Of a cache of more tokens, the first are read.

        Returns:
            Activations, mapped into memory.

        Raises:
            FileNotFoundError: If there is no cache.
            ValueError: If it is one of other settings, or not complete.
        """
        splits: dict[str, Activations] = {}
        for name, split in settings.splits().items():
            path = Path(folder, name)
            manifest = _read_manifest(path)
            if manifest is None:
                raise FileNotFoundError(f"{path} holds no activations")
            split.require_fit(path, manifest)
            if manifest["tokens"] < split.tokens:
                raise ValueError(
                    f"{path} holds {manifest['tokens']:,} tokens of {split.tokens:,}: "
                    "caching was not finished"
                )
            shards = [_map_shard(file)["activations"] for file in _shards(path)]
            splits[name] = Activations(shards, split.tokens)
        return cls(**splits, settings=settings, folder=Path(folder))

    def describe(self) -> dict[str, Any] | None:
        """
        What records tell a cache by.

        Returns:
            The settings and, of a cache on disk, ``texts``: for each split a hash of its
            first shard's tokens, because installed packages change what "docstrings" are.
        """
        if self.settings is None:
            return None
        description = asdict(self.settings)
        if self.folder is not None:
            description["texts"] = {
                name: _digest(_shards(self.folder / name)[0])
                for name in self.settings.splits()
            }
        return description

    def to(self, device: str | torch.device) -> "ActivationCache":
        """The same in a device's memory."""
        splits = (self.train, self.in_domain, self.other_domain)
        train, in_domain, other = (s and s.to(device) for s in splits)
        assert train is not None and in_domain is not None
        return ActivationCache(train, in_domain, other, self.settings, self.folder)


def cache_activations(
    settings: CacheSettings,
    folder: str | Path,
    *,
    model: HookedSAETransformer | None = None,
    texts: Mapping[Split, Dataset | IterableDataset] | None = None,
    prompts_per_batch: int = 16,
    device: str = "cpu",
) -> ActivationCache:
    """
    Run the language model, and keep its activations in bfloat16 and the tokens they are of.

    What is there already is not computed again: after an interruption it goes on with the
    next shard, and a finished cache can be made longer. Special tokens are left out, as in
    training with ``exclude_special_tokens``.

    Args:
        settings: What to cache.
        folder: Folder of the cache.
        model: The language model, by default loaded by its name when it is needed.
        texts: The texts, likewise.
        prompts_per_batch: Contexts that the model reads at once.
        device: Where the model runs.

    Returns:
        The cache.

    Raises:
        ValueError: If the folder holds something else, or a text is too short.
    """
    for name, split in settings.splits().items():
        path = Path(folder, name)
        manifest = _read_manifest(path)
        if manifest is not None:
            split.require_fit(path, manifest)
            if manifest["tokens"] >= split.tokens:
                continue
        if model is None:
            model = load_language_model(settings.model, device)
        text = (texts or {}).get(name) or load_text(split.text, split.text_split)
        _cache_split(split, path, model, text, prompts_per_batch, device)
    return ActivationCache.open(folder, settings)


def token_store(
    model: HookedSAETransformer,
    text: Dataset | IterableDataset,
    hook_name: str,
    context_size: int,
    d_in: int = 1,
    autocast_lm: bool = False,
) -> ActivationsStore:
    """
    SAELens's store, for its ``iterable_sequences`` and ``get_activations``.

    Args:
        model: The language model.
        text: What it reads.
        hook_name: Hook of the activations.
        context_size: Tokens per context, BOS included.
        d_in: Width of the activations, if they are wanted.
        autocast_lm: Whether they are computed in bfloat16; the residual stream stays in
            float32.

    Returns:
        The store, at the start of the text.
    """
    return ActivationsStore(
        model=model,
        dataset=text,
        streaming=False,
        hook_name=hook_name,
        hook_head_index=None,
        context_size=context_size,
        d_in=d_in,
        # Of no concern to what is used of it.
        n_batches_in_buffer=1,
        total_training_tokens=1,
        store_batch_size_prompts=1,
        train_batch_size_tokens=context_size,
        prepend_bos=True,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype="float32",
        autocast_lm=autocast_lm,
    )


def _cache_split(
    split: _SplitSettings,
    folder: Path,
    model: HookedSAETransformer,
    text: Dataset | IterableDataset,
    prompts_per_batch: int,
    device: str,
) -> None:
    excluded = excluded_ids(model, True)
    known = _read_manifest(folder) or {}
    manifest = {
        **asdict(split),
        "tokens": 0,
        "dtype": "bfloat16",
        # What was begun on another machine goes on as it began.
        "autocast_lm": known.get("autocast_lm", True)
        if known
        else fast_bfloat16(device),
        "d_in": _width(model, split.hook_name),
        "excluded_token_ids": excluded.tolist(),
        "versions": {n: version(n) for n in ("torch", "sae-lens", "transformer-lens")},
    }
    if not known:
        _write_manifest(folder, manifest)
    store = token_store(
        model,
        text,
        split.hook_name,
        split.context_size,
        manifest["d_in"],
        manifest["autocast_lm"],
    )
    per_shard = max(1, _SHARD_POSITIONS // split.context_size)
    rows = 0
    with tqdm(total=split.tokens, desc=f"Activations of {folder.name}") as bar:
        for i in count():
            contexts = list(islice(store.iterable_sequences, per_shard))
            if not contexts:
                raise ValueError(
                    f"{split.text} ({split.text_split}) ends after {rows:,} tokens, "
                    f"but {split.tokens:,} are wanted"
                )
            tokens = torch.stack(contexts)
            token_ids = tokens.flatten()
            keep = ~torch.isin(token_ids, excluded)
            file = folder / f"{i:05}.safetensors"
            if file.exists():
                # The text itself is not kept, but this much of it is known.
                before = _map_shard(file)["token_ids"].long()
                if not torch.equal(before, token_ids[keep]):
                    raise ValueError(f"{file} was made from another text")
            else:
                activations = torch.cat(
                    [
                        store.get_activations(part.to(device)).bfloat16()
                        for part in tokens.split(prompts_per_batch)
                    ]
                )
                shard = {
                    "activations": activations.flatten(0, 1)[keep],
                    "token_ids": token_ids[keep].int(),
                }
                with replacing_files(folder) as temporary:
                    save_file(shard, temporary / file.name)
            new = int(keep.sum())
            rows += new
            bar.update(new)
            if rows >= split.tokens:
                break
    _write_manifest(folder, {**manifest, "tokens": rows})


def _width(model: HookedSAETransformer, hook_name: str) -> int:
    if hook_name not in model.hook_dict:
        raise ValueError(f"hook_name must be a hook of the model, got {hook_name!r}")
    _, cache = model.run_with_cache(
        torch.zeros(1, 2, dtype=torch.long, device=model.cfg.device),
        names_filter=[hook_name],
        stop_at_layer=extract_stop_at_layer_from_tlens_hook_name(hook_name),
        prepend_bos=False,
    )
    return cache[hook_name].shape[2:].numel()


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _map_shard(file: Path) -> dict[str, torch.Tensor]:
    with safe_open(file, "pt") as shard:
        return {name: shard.get_tensor(name) for name in ("activations", "token_ids")}


def _digest(file: Path) -> str:
    tokens = _map_shard(file)["token_ids"].numpy()
    return hashlib.sha256(tokens.tobytes()).hexdigest()[:16]


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    path = folder / _MANIFEST
    return json.loads(path.read_text()) if path.exists() else None


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    with replacing_files(folder) as temporary:
        (temporary / _MANIFEST).write_text(json.dumps(manifest, indent=1))
