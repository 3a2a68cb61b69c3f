"""
Cached activations of a language model, their settings and readers.

The package writes and maps them; this reads them in the orders of the experiments.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from sae_lens_scale.cache import reading
from sae_lens_scale.cache.manifest import read_manifest
from sae_lens_scale.cache.reading import map_shards

from .settings import set_types

Split = Literal["train", "in_domain", "other_domain", "unseen_text"]


@dataclass(frozen=True)
class CacheSettings:
    """
    Settings of cached activations.

    Args:
        model: "smollm2" or the name of a TransformerLens model.
        text: Text to train on, and in another part of it to evaluate on; a name
            that :func:`.load_text` knows.
        other_text: Text of another domain to evaluate on.
        unseen_text: A third text to evaluate on, of which no setting was chosen.
        train_tokens, test_tokens, other_tokens: Tokens to train on, and to evaluate on of the
            training text's other part and of each other text.
        context_size: Tokens per prompt, BOS included.
    """

    model: str = "smollm2"
    hook_name: str = "blocks.8.hook_resid_post"
    text: str = "docstrings"
    other_text: str | None = None
    unseen_text: str | None = None
    train_tokens: int = 2_000_000
    test_tokens: int = 100_000
    other_tokens: int = 100_000
    context_size: int = 256

    def __post_init__(self) -> None:
        set_types(self)
        for name in ("train_tokens", "test_tokens", "other_tokens", "context_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")

    def splits(self) -> dict[Split, "SplitSettings"]:
        """Settings of each split; it is cached in a folder of its name."""
        common = (self.model, self.hook_name, self.context_size)
        splits: dict[Split, SplitSettings] = {
            "train": SplitSettings(*common, self.text, "train", self.train_tokens),
            "in_domain": SplitSettings(*common, self.text, "test", self.test_tokens),
        }
        others: tuple[tuple[Split, str | None], ...] = (
            ("other_domain", self.other_text),
            ("unseen_text", self.unseen_text),
        )
        for name, text in others:
            if text is not None:
                splits[name] = SplitSettings(*common, text, "all", self.other_tokens)
        return splits


@dataclass(frozen=True)
class SplitSettings:
    """
    Settings of the activations of one folder: of ``tokens`` tokens, special ones left out, of a
    part of a text. The rest is as in :class:`CacheSettings`.
    """

    model: str
    hook_name: str
    context_size: int
    text: str
    text_split: Literal["train", "test", "all"]
    tokens: int

    def require_fit(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        """Refuse a manifest of other settings; the number of tokens may differ."""
        for name, value in asdict(self).items():
            if name != "tokens" and manifest[name] != value:
                raise ValueError(
                    f"{folder} holds activations of {name}={manifest[name]!r}, "
                    f"not {value!r}"
                )


class Activations(reading.Activations):
    """Activations of many tokens, whose tokens can be taken one by one."""

    def to(self, device: str | torch.device) -> "Activations":
        """Copy them to a device's memory, in one piece: reading them there costs nothing."""
        first = self._parts[0]
        if len(self._parts) == 1:
            return Activations([first[: len(self)].to(device)])
        # Part by part: there may be no room for all of them twice.
        whole = torch.empty(len(self), self.d_in, dtype=first.dtype, device=device)
        start = 0
        for part in self._parts:
            here = whole[start : start + len(part)]
            here.copy_(part[: len(here)])
            start += len(here)
        return Activations([whole])

    def take(self, indices: torch.Tensor) -> torch.Tensor:
        """Read the tokens at the positions ``[n]``, in float32: ``[n, d_in]``."""
        first = self._parts[0]
        if len(self._parts) == 1:
            return first[indices.to(first.device)].float()
        rows = torch.empty(len(indices), self.d_in, dtype=first.dtype)
        part_of = torch.searchsorted(torch.tensor(self._ends), indices, right=True)
        for i in part_of.unique().tolist():
            here = (part_of == i).nonzero().squeeze(-1)
            part = self._parts[i]
            rows[here] = part[indices[here] - (self._ends[i] - len(part))]
        return rows.float()

    def sample(self, n: int, seed: int = 0) -> torch.Tensor:
        """
        Choose n tokens at random, the same for the same seed, or all if there are fewer; they are in
        float32, ``[n, d_in]``.
        """
        return self.take(next(self._orders(seed))[:n])

    def batches(self, batch_size: int) -> Iterator[torch.Tensor]:
        """Read all tokens once, in their order, in float32; the last batch may be smaller."""
        for indices in torch.arange(len(self)).split(batch_size):
            yield self.take(indices)

    def shuffled(self, batch_size: int, seed: int) -> Iterator[torch.Tensor]:
        """
        Read batches to train on, without an end: each epoch is mixed anew over all tokens.

        Yields:
            ``[batch_size, d_in]`` in float32; the incomplete batch of an epoch is left out.

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
    The activations that a grid trains and is evaluated on.

    Attributes:
        in_domain: Activations to evaluate on: of other documents of the same text.
        other_domain: Activations of a text of another domain.
        unseen_text: Activations of a third text, of which no setting was chosen.
        settings: Their settings; None if they were not cached.
        folder: Their folder on disk, if they have one.
    """

    train: Activations
    in_domain: Activations
    other_domain: Activations | None = None
    unseen_text: Activations | None = None
    settings: CacheSettings | None = None
    folder: Path | None = None

    @classmethod
    def open(cls, folder: str | Path, settings: CacheSettings) -> "ActivationCache":
        """
        Map a cache that :func:`.cache_activations` wrote into memory; of more tokens, the first.

        Raises:
            FileNotFoundError: If there is no cache.
            ValueError: If it is one of other settings, or not complete.
        """
        splits: dict[str, Activations] = {}
        for name, split in settings.splits().items():
            path = Path(folder, name)
            manifest = read_manifest(path)
            if manifest is None:
                raise FileNotFoundError(
                    f"{path} holds no activations: cache them first (cache_activations, "
                    "or python -m reproduction cache)"
                )
            split.require_fit(path, manifest)
            if manifest["tokens"] < split.tokens:
                raise ValueError(
                    f"{path} holds {manifest['tokens']:,} tokens of {split.tokens:,}: "
                    "caching was not finished"
                )
            shards = [shard["activations"] for shard in map_shards(path)]
            splits[name] = Activations(shards, split.tokens)
        return cls(**splits, settings=settings, folder=Path(folder))

    def describe(self) -> dict[str, Any] | None:
        """
        Describe the cache for records: its settings and, of a cache on disk, ``texts``: its
        :attr:`text_hashes`.
        """
        if self.settings is None:
            return None
        texts = {} if self.folder is None else {"texts": self.text_hashes}
        return asdict(self.settings) | texts

    @cached_property
    def text_hashes(self) -> dict[str, str]:
        """
        Hash of the tokens that are read, for each split: the text "docstrings" changes with
        the installed packages. Of a cache on disk only.
        """
        assert self.settings is not None and self.folder is not None
        hashes = {}
        for name, split in self.settings.splits().items():
            parts = [shard["token_ids"] for shard in map_shards(self.folder / name)]
            hashes[name] = text_hash(torch.cat(parts)[: split.tokens])
        return hashes

    def to(self, device: str | torch.device) -> "ActivationCache":
        """Copy the activations to a device's memory."""
        return replace(
            self,
            train=self.train.to(device),
            in_domain=self.in_domain.to(device),
            other_domain=self.other_domain and self.other_domain.to(device),
            unseen_text=self.unseen_text and self.unseen_text.to(device),
        )


def text_hash(token_ids: torch.Tensor) -> str:
    """Hash token ids ``[tokens]``, special ones left out: 16 hexadecimal digits of a SHA-256."""
    return hashlib.sha256(token_ids.int().numpy().tobytes()).hexdigest()[:16]
