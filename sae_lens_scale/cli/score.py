"""``sae-lens-scale score``: the field's standard scores of several SAEs at once."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

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

from .arguments import filled, path, positive
from .output import note, table
from .sae_on_text import (
    LanguageModels,
    add_options,
    find_evaluable,
    load_evaluable,
    noting_repetition,
    open_text,
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
        column: The same for all SAEs that are shown as one.
        facts: Model, hook, text and context size, by the names that they have in the results.
        activations: Folder of the language model's activations on the probing texts.
        reconstruction: File of the reconstruction scores.
        probing: File of each data set.
    """

    name: str
    sae_id: str | None
    column: str
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


def _run(options: argparse.Namespace) -> str:
    require("matplotlib", "score")
    datasets = shortest_datasets(options.probing_datasets)
    require_writable("--output", options.output)
    models = LanguageModels(options.device)
    jobs: dict[Path, _Job] = {}
    for name, sae_id in find_evaluable(options):
        job = _job(options, models, datasets, name, sae_id)
        other = jobs.setdefault(job.reconstruction, job)
        if other is not job:
            raise ValueError(
                f"SAEs must differ from each other, got {other.title} and {job.title}"
            )
    _say_cost(options, list(jobs.values()))
    columns: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for number, job in enumerate(jobs.values(), 1):
        note(f"SAE {number} of {len(jobs)}: {job.title}")
        result = _score(options, models, job)
        columns.setdefault(job.column, []).append((job.title, result))
    return _show(options, datasets, list(columns.values()))


def _job(
    options: argparse.Namespace,
    models: LanguageModels,
    datasets: Sequence[str],
    name: str,
    sae_id: str | None,
) -> _Job:
    """Refuse a text, hook or context that does not suit the model, and name the results."""
    asked = load_evaluable(options, name, sae_id)
    sae, metadata = asked.sae, asked.sae.cfg.metadata
    if metadata.hook_head_index is not None:
        raise ValueError(
            f"{name} must be an SAE of all its hook's heads, for sae-probes reads these, "
            f"got hook_head_index={metadata.hook_head_index}"
        )
    # As of any option, the last counts.
    text, context_size = asked.datasets[-1], asked.context_sizes[-1]
    model = models.of(asked)
    prompt = open_text(asked, model, text, context_size, 1).get_batch_tokens(1)
    # As it is on every device.
    cfg = {key: value for key, value in asked.sae_cfg.items() if key != "device"}
    of_sae = digest(cfg, sae.state_dict().items())
    of_model = digest(
        {"context_size": context_size, "sae-probes": version("sae-probes")},
        ((key, p.flatten()[:_FIRST_VALUES]) for key, p in model.named_parameters()),
    )
    of_probing = digest({"sae": of_sae, "model": of_model, "ks": KS})
    of_reconstruction = digest(
        {
            "sae": of_sae,
            "model": of_model,
            "text": text,
            "n_eval_batches": options.n_eval_batches,
            "batch_size_prompts": options.batch_size_prompts,
            "sae-lens": version("sae-lens"),
        },
        # Another text under the same name most likely begins otherwise.
        [("prompt", prompt)],
    )
    settings = settings_but_seed(sae, Path(name) if sae_id is None else None)
    results = options.output / "results"
    return _Job(
        name,
        sae_id,
        digest(settings) if options.group else of_sae,
        {
            "model": asked.model[0],
            "hook_name": metadata.hook_name,
            "dataset": text,
            "context_size": context_size,
        },
        options.output / "activations" / of_model,
        results / f"reconstruction-{of_reconstruction}.json",
        {dataset: results / f"{dataset}-{of_probing}.json" for dataset in datasets},
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


def _score(
    options: argparse.Namespace, models: LanguageModels, job: _Job
) -> dict[str, Any]:
    asked = load_evaluable(options, job.name, job.sae_id)
    model = models.of(asked)
    text, context_size = job.facts["dataset"], job.facts["context_size"]
    datasets, folder = list(job.probing), job.activations
    cache_activations(model, job.hook, datasets, folder, context_size, options.device)

    def reconstruction() -> dict[str, Any]:
        batches, prompts = options.n_eval_batches, options.batch_size_prompts
        store = open_text(asked, model, text, context_size, prompts)
        with noting_repetition(store, text):
            return reconstruction_scores(model, asked.sae, store, batches, prompts)

    scores = stored(job.reconstruction, reconstruction)
    probed = {
        name: stored(file, partial(sparse_probing, asked.sae, job.hook, name, folder))
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


def _show(
    options: argparse.Namespace,
    datasets: Sequence[str],
    columns: Sequence[Sequence[tuple[str, dict[str, Any]]]],
) -> str:
    """Write the scores as JSON and as a picture, and format them for the terminal."""
    groups, spreads, shown = [], {}, []
    for members in columns:
        titles, results = zip(*members, strict=True)
        first = results[0]
        scores = {
            name: spread([result["scores"][name] for result in results])
            for name in first["scores"]
        }
        as_json = {name: asdict(score) for name, score in scores.items()}
        groups.append({"saes": titles, "scores": as_json})
        more = len(titles) - 1
        title = f"{titles[0]} and {more} more" if more else titles[0]
        spreads[title] = scores
        facts = {name: first[name] for name in ("model", "hook_name", "dataset")}
        cells = {name: _cell(score) for name, score in scores.items()}
        shown.append({"sae": title, **facts, **cells})
    content = dump_json(
        {
            "n_eval_batches": options.n_eval_batches,
            "batch_size_prompts": options.batch_size_prompts,
            "probing_datasets": datasets,
            "groups": groups,
            "saes": [result for members in columns for _, result in members],
        }
    )
    write_whole(options.output / "scores.json", content)
    figure = plot_scores(list(spreads), list(spreads.values()))
    with replacing_files(options.output) as folder:
        figure.savefig(folder / "scores.png", dpi=150)
    note(f"scores.json and scores.png are in {options.output}")
    return content if options.json else table(*shown)


def _cell(score: Spread) -> str | None:
    if score.mean is None:
        return None
    std = "" if score.std is None else f" ± {score.std:.2g}"
    return f"{score.mean:.4g}{std}"
