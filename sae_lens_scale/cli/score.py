"""``sae-lens-scale score``: the field's standard scores of several SAEs at once."""

import argparse
import gc
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import sae_lens
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
from sae_lens_scale.analysis.scores.spread import settings_but_seed
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
from .output import note, table
from .sae_argument import find_saes
from .sae_on_text import (
    Asked,
    add_options,
    load_asked,
    load_model_of,
    open_text,
    require_dataset,
)

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
    add_options(parser)
    # Of one value each, in a list as in commands that take several.
    parser.add_argument(
        "--dataset",
        type=filled,
        nargs=1,
        help="text of the reconstruction, by default what the SAE was trained on: a name "
        'or folder that datasets can load, or "docstrings" (the held-out ones of the '
        "installed packages)",
    )
    parser.add_argument(
        "--context_size",
        type=positive,
        nargs=1,
        help="tokens per prompt and, of a probing text, the last ones that are read; by "
        "default as in training",
    )
    parser.add_argument(
        "--n_eval_batches",
        type=positive,
        default=10,
        help="batches of prompts for the loss, and as many for all else but probing "
        "(default: %(default)s)",
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
        "--output",
        type=path,
        default=Path("scores"),
        help="folder of scores.json, scores.png, and of what a later call need not do "
        "again (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_run)


@dataclass(frozen=True)
class _Job:
    """
    An SAE to score, and the files of its results.

    Attributes:
        name: Folder, release or repository.
        sae_id: The SAE in a release or repository.
        digest: Name of its config and weights.
        settings: Name of its settings without the seed.
        facts: Model, hook, text and context size, by the names that they have in the results.
        activations: Folder of the language model's activations on the probing texts.
        reconstruction: File of the reconstruction scores.
        probing: File of each data set.
    """

    name: str
    sae_id: str | None
    digest: str
    settings: str
    facts: dict[str, Any]
    activations: Path
    reconstruction: Path
    probing: dict[str, Path]

    @property
    def title(self) -> str:
        return " ".join(filter(None, (self.name, self.sae_id)))

    @property
    def hook(self) -> str:
        return self.facts["hook_name"]


class _Models:
    """Language models, of which one is in memory at a time."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._loaded: Any = None
        self._model: Any = None

    def of(self, asked: Asked) -> Any:
        """Load the model of an SAE, unless it is the last one's."""
        if asked.model != self._loaded:
            # Collected, for its parts refer to each other: there may be no memory for two.
            self._model = self._loaded = None
            gc.collect()
            self._model = load_model_of(asked, self._device)
            self._loaded = asked.model
        return self._model


def _run(options: argparse.Namespace) -> str:
    require("matplotlib", "score")
    require_writable("--output", options.output)
    names = find_saes(options.saes)
    datasets = shortest_datasets(options.probing_datasets)
    # A wrong name, or file, is an error now, not after hours.
    for dataset in options.dataset or ():
        require_dataset(dataset)
    if len(names) > 1:
        for name, sae_id in names:
            _load(options, name, sae_id)
    models = _Models(options.device)
    jobs = [_job(options, models, datasets, *name) for name in names]
    _require_different(jobs)
    _say_cost(options, jobs)
    results = []
    for number, job in enumerate(jobs, 1):
        note(f"SAE {number} of {len(jobs)}: {job.title}")
        results.append(_score(options, job, models))
    columns = _columns(jobs, results, options.group)
    return _show(options, datasets, columns, results)


def _load(options: argparse.Namespace, name: str, sae_id: str | None) -> Asked:
    """Load an SAE that both SAELens's evaluation and sae-probes know how to run."""
    asked = load_asked(options, name, sae_id)
    metadata = asked.sae.cfg.metadata
    hook = metadata.hook_name
    if (metadata.hook_name_out or hook) != hook or metadata.hook_head_index is not None:
        raise ValueError(
            f"{name} must be an SAE of one hook and of all its heads, got "
            f"hook_name={hook!r}, hook_name_out={metadata.hook_name_out!r}, "
            f"hook_head_index={metadata.hook_head_index!r}"
        )
    return asked


def _job(
    options: argparse.Namespace,
    models: _Models,
    datasets: Sequence[str],
    name: str,
    sae_id: str | None,
) -> _Job:
    """Refuse a text, hook or context that does not suit the model, and name the results."""
    from sae_probes import __version__ as sae_probes_version

    asked = _load(options, name, sae_id)
    (text,), (context_size,) = asked.datasets, asked.context_sizes
    model = models.of(asked)
    require_context("--context_size", context_size, model)
    _, prompt = open_text(asked, model, text, context_size, options.batch_size_prompts)
    sae, hook = asked.sae, asked.sae.cfg.metadata.hook_name
    require_hook(model, asked.model[0], prompt, hook, None, sae.cfg.d_in)
    # As it is on every device.
    cfg = {key: value for key, value in asked.sae_cfg.items() if key != "device"}
    of_sae = digest(cfg, sae.state_dict().items())
    of_model = digest(
        {"context_size": context_size, "sae-probes": sae_probes_version},
        (
            (parameter_name, parameter.flatten()[:_FIRST_VALUES])
            for parameter_name, parameter in model.named_parameters()
        ),
    )
    of_probing = digest({"sae": of_sae, "model": of_model, "ks": KS})
    of_reconstruction = digest(
        {
            "sae": of_sae,
            "model": of_model,
            "text": text,
            "n_eval_batches": options.n_eval_batches,
            "batch_size_prompts": options.batch_size_prompts,
            "sae-lens": sae_lens.__version__,
        },
        # Another text under the same name most likely begins otherwise.
        [("prompt", prompt)],
    )
    results = options.output / "results"
    return _Job(
        name,
        sae_id,
        of_sae,
        digest(settings_but_seed(sae, Path(name) if sae_id is None else None)),
        {
            "model": asked.model[0],
            "hook_name": hook,
            "dataset": text,
            "context_size": context_size,
        },
        options.output / "activations" / of_model,
        results / f"reconstruction-{of_reconstruction}.json",
        {dataset: results / f"{dataset}-{of_probing}.json" for dataset in datasets},
    )


def _require_different(jobs: Sequence[_Job]) -> None:
    by_digest: dict[str, _Job] = {}
    for job in jobs:
        other = by_digest.setdefault(job.digest, job)
        if other is not job:
            raise ValueError(
                f"SAEs must differ from each other, got {other.title} and {job.title}"
            )


def _say_cost(options: argparse.Namespace, jobs: Sequence[_Job]) -> None:
    characters = dataset_characters()
    prompts = 2 * options.n_eval_batches * options.batch_size_prompts
    tokens = sum(
        prompts * job.facts["context_size"]
        for job in jobs
        if not job.reconstruction.exists()
    )
    texts = {
        (job.activations, job.hook, name)
        for job in jobs
        for name in missing_activations(list(job.probing), job.hook, job.activations)
    }
    files = [file for job in jobs for file in job.probing.values()]
    left = sum(not file.exists() for file in files)
    note(
        f"to do: {tokens:,} tokens for the reconstruction; the language model on "
        f"{sum(characters[name] for *_, name in texts):,} characters of {len(texts)} "
        f"data sets; {left} of {len(files)} probings. {options.output} keeps what is "
        "done: the same command goes on after an interruption"
    )


def _score(options: argparse.Namespace, job: _Job, models: _Models) -> dict[str, Any]:
    asked = _load(options, job.name, job.sae_id)
    model = models.of(asked)
    context_size, text = job.facts["context_size"], job.facts["dataset"]
    cache_activations(
        model,
        job.hook,
        list(job.probing),
        job.activations,
        context_size,
        options.device,
    )

    def reconstruction() -> dict[str, Any]:
        batches, prompts = options.n_eval_batches, options.batch_size_prompts
        store, _ = open_text(asked, model, text, context_size, prompts)
        first_reading = store.iterable_sequences
        found = reconstruction_scores(model, asked.sae, store, batches, prompts)
        if store.iterable_sequences is not first_reading:
            note(f"{text} has less text than that: some was read more than once")
        return found

    def probing(dataset: str) -> dict[str, float]:
        return sparse_probing(asked.sae, job.hook, dataset, job.activations)

    scores = stored(job.reconstruction, reconstruction)
    probed = {
        name: stored(file, partial(probing, name))
        for name, file in tqdm(job.probing.items(), desc="probing", unit="data set")
    }
    for k in KS:
        aucs = [of_dataset[str(k)] for of_dataset in probed.values()]
        scores[f"probing_auc_{k}"] = spread(aucs).mean
    return {
        "sae": job.name,
        "sae_id": job.sae_id,
        **job.facts,
        "scores": scores,
        "probing": probed,
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
    jobs: Sequence[_Job], results: Sequence[dict[str, Any]], group: bool
) -> list[_Column]:
    groups: dict[str, list[tuple[_Job, dict[str, Any]]]] = {}
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
