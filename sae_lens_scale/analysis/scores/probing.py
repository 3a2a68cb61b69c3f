"""
Sparse probing: classifiers that read a few latents, on the data sets of ``sae-probes``.

For each of its 113 binary data sets (sentiment, topics, facts, code, …) the latents whose mean
activations differ most between the two classes are found on training texts, and a logistic
regression on these k latents is tested on other texts. An SAE whose latents are concepts needs
few of them. See `Are Sparse Autoencoders Useful? <https://arxiv.org/abs/2502.16681>`_.
"""

import io
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from sae_lens import SAE
from tqdm.auto import tqdm

from sae_lens_scale.analysis.language_model import tokenizer_of
from sae_lens_scale.extras import require
from sae_lens_scale.files import read_json, replacing_files

# Numbers of latents that a classifier reads.
KS = (1, 5, 16)
# The name of the language model in the names of sae-probes' files; they lie in a folder of
# their own for each.
_MODEL = "model"
_BATCH_TEXTS = 32


@cache
def dataset_characters() -> dict[str, int]:
    """
    Count the characters of each data set's texts.

    Returns:
        Counts by name, the shortest data set first.

    Raises:
        ImportError: If ``sae-probes`` is not installed.
    """
    sae_probes = _sae_probes()
    read = sae_probes.utils_data.read_numbered_dataset_df
    found = {
        name: int(read(name)["prompt"].str.len().sum()) for name in sae_probes.DATASETS
    }
    return dict(sorted(found.items(), key=lambda entry: entry[1]))


def shortest_datasets(number: int) -> list[str]:
    """
    Choose the data sets with the least text, which the language model has to read.

    Raises:
        ImportError: If ``sae-probes`` is not installed.
        ValueError: If there are not so many.
    """
    names = list(dataset_characters())
    if not 1 <= number <= len(names):
        raise ValueError(
            f"probing_datasets must be between 1 and {len(names)}, got {number}"
        )
    return names[:number]


def missing_activations(datasets: Sequence[str], hook: str, folder: Path) -> list[str]:
    """List the data sets whose activations at a hook a folder lacks."""
    return [name for name in datasets if not _file(folder, name, hook).exists()]


def cache_activations(
    model: Any,
    hook: str,
    datasets: Sequence[str],
    folder: Path,
    context_size: int,
    device: str,
) -> None:
    """
    Run a language model on the texts of data sets, once for all SAEs of a hook.

    A text's activation is that of its last token, as ``sae-probes`` has it. Data sets that
    the folder holds are passed over. Shows a progress bar.

    Args:
        model: The language model, as for :func:`.top_activating_contexts`.
        hook: Name of the hook.
        datasets: Names of data sets.
        folder: Folder of this language model and context size, and of no other.
        context_size: Tokens of a text that the model reads, its last ones.
        device: Device of the model.

    Raises:
        ImportError: If ``sae-probes`` is not installed.
        ValueError: If the model's tokenizer cannot pad.
    """
    generation = _sae_probes().generate_model_activations
    tokenizer = tokenizer_of(model, "sparse probing")
    if tokenizer.pad_token is None:
        raise ValueError(
            "the language model's tokenizer must have a padding token, for sparse "
            "probing, got none"
        )
    characters = dataset_characters()
    missing = missing_activations(datasets, hook, folder)
    progress = tqdm(
        total=sum(characters[name] for name in missing),
        desc="activations of the probing texts",
        unit="char",
        unit_scale=True,
        disable=not missing,
    )
    with progress, _keeping_sides(tokenizer):
        for name in missing:
            file = _file(folder, name, hook)
            with replacing_files(file.parent) as temporary:
                with _quietly():
                    generation.ensure_dataset_activations(
                        _MODEL,
                        [name],
                        [hook],
                        temporary,
                        device=device,
                        max_seq_len=context_size,
                        batch_size=_BATCH_TEXTS,
                        model=model,
                    )
                written = _file(temporary, name, hook)
                written.rename(temporary / file.name)
                written.parent.rmdir()
            progress.update(characters[name])


def sparse_probing(
    sae: SAE[Any], hook: str, dataset: str, folder: Path
) -> dict[str, float]:
    """
    Measure how well a few latents of an SAE tell the two classes of a data set apart.

    Args:
        sae: The SAE, for inference.
        hook: Name of its hook.
        dataset: Name of the data set.
        folder: Folder that :func:`cache_activations` has filled.

    Returns:
        Area under the ROC curve on the test texts, by the number of latents (:data:`KS`).

    Raises:
        ImportError: If ``sae-probes`` is not installed.
        FileNotFoundError: If the folder lacks the activations.
    """
    run_sae_evals = _sae_probes().run_sae_evals
    if missing_activations([dataset], hook, folder):
        # sae-probes would look for a model of that name on the hub.
        raise FileNotFoundError(f"{_file(folder, dataset, hook)} is missing")
    with tempfile.TemporaryDirectory() as results, _quietly():
        run_sae_evals(
            sae,
            _MODEL,
            hook,
            reg_type="l1",
            setting="normal",
            ks=list(KS),
            results_path=results,
            model_cache_path=folder,
            datasets=[dataset],
            device=str(sae.device),
        )
        (file,) = Path(results).rglob("*.json")
        return {str(entry["k"]): entry["test_auc"] for entry in read_json(file)}


def _sae_probes() -> Any:
    """Import sae-probes, which only an environment with the extra has."""
    require("sae_probes", "score")
    return import_module("sae_probes")


def _file(folder: Path, dataset: str, hook: str) -> Path:
    """Path of activations as sae-probes names them."""
    return folder / f"model_activations_{_MODEL}" / f"{dataset}_{hook}.pt"


@contextmanager
def _keeping_sides(tokenizer: Any) -> Iterator[None]:
    """Restore the tokenizer's settings that sae-probes changes."""
    names = ("truncation_side", "padding_side")
    before = {name: getattr(tokenizer, name) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(tokenizer, name, value)


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep what sae-probes and scikit-learn print from the terminal, progress bars too."""
    out, err = redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO())
    with out, err, warnings.catch_warnings():
        # Of arguments that scikit-learn 1.8 has renamed.
        warnings.simplefilter("ignore")
        yield
