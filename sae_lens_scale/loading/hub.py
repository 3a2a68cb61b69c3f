"""Uploading of exports to the Hugging Face hub, with a model card."""

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.constants import REPOCARD_NAME
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from sae_lens import SAE, upload_saes_to_huggingface
from sae_lens.constants import RUNNER_CFG_FILENAME, SAE_CFG_FILENAME
from sae_lens.registry import get_sae_training_class

from sae_lens_scale.files import dump_json, read_json
from sae_lens_scale.saes.mixture import MixtureSAE

from .errors import is_of_the_machine

METRICS_FILENAME = "metrics.json"

_PAPERS = {
    "switch": "Mudide et al. 2024, [*Efficient Dictionary Learning with Switch Sparse "
    "Autoencoders*](https://arxiv.org/abs/2410.08201)",
    "scale": "Xu et al. 2025, [*Beyond Redundancy: Diverse and Specialized Multi-Expert "
    "Sparse Autoencoder*](https://arxiv.org/abs/2511.05745)",
}
# Of the runner's config; what the SAE's own config decides is in its metadata.
_RUN = (
    "training_tokens",
    "train_batch_size_tokens",
    "context_size",
    "exclude_special_tokens",
    "lr",
    "lr_scheduler_name",
    "lr_warm_up_steps",
    "lr_decay_steps",
    "adam_beta1",
    "adam_beta2",
    "dead_feature_window",
    "seed",
)


def upload(
    folder: str | Path,
    repo_id: str,
    sae_id: str | None = None,
    *,
    metrics: str | Path | None = None,
    private: bool = False,
) -> str:
    """
    Upload an export with SAELens, and describe it in the repository's model card.

    The card has a section for each SAE, which a later upload under the same ``sae_id``
    replaces; all else that is in it stays. ``SAE.from_pretrained(repo_id, sae_id)`` loads
    the SAE.

    Args:
        folder: Folder of the export, such as a runner's ``output_path``.
        repo_id: The repository, "owner/name", which is made if there is none.
        sae_id: Name of the SAE in it; by default that of the folder.
        metrics: What ``sae-lens-scale evaluate --output`` wrote about this SAE, and maybe
            others; by default ``metrics.json`` in the folder, if there is one.
        private: Make the repository private.

    Returns:
        Address of the model card.

    Raises:
        ValueError: If the folder holds no export of a Scale or Switch SAE, the metrics are
            of another SAE, a name is none, or ``private`` is asked of a public repository.
        FileNotFoundError: If there is no such folder or no such file of metrics.
        OSError: If the hub knows no token of the user, or refuses it.
    """
    folder = Path(folder)
    sae_id = folder.resolve().name if sae_id is None else sae_id
    _require_names(repo_id, sae_id)
    sae = _load_export(folder)
    section = _section(sae, folder, repo_id, sae_id, _metrics(sae, folder, metrics))

    api = HfApi()
    # The hub's answers to those whom it does not know are about missing repositories.
    api.whoami()
    card = _card(repo_id)
    _insert(card, sae_id, section)
    card.data["library_name"] = card.data.get("library_name") or "saelens"
    tags = {"sparse-autoencoder", "sae-lens-scale", sae.cfg.architecture()}
    card.data["tags"] = sorted(tags.union(card.data.get("tags") or ()))
    try:
        is_private = api.repo_info(repo_id).private
    except RepositoryNotFoundError:
        api.create_repo(repo_id, private=private or None)
    else:
        if private and not is_private:
            raise ValueError(f"private: {repo_id} exists and is public")
    upload_saes_to_huggingface(
        {sae_id: folder}, repo_id, show_progress=False, add_default_readme=False
    )
    # Checks the card where it uploads it; huggingface-hub 0's card.push_to_hub knows one hub only.
    api.upload_file(
        path_or_fileobj=str(card).encode(),
        path_in_repo=REPOCARD_NAME,
        repo_id=repo_id,
        commit_message=f"Describe SAE {sae_id}",
    )
    return f"{api.endpoint}/{repo_id}"


def _require_names(repo_id: str, sae_id: str) -> None:
    validate_repo_id(repo_id)
    if "/" not in repo_id:
        raise ValueError(f"repo_id must be OWNER/NAME, got {repo_id!r}")
    # Of folders and files on the hub; and "-->" would end the card's mark.
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)*", sae_id) or "--" in sae_id:
        raise ValueError(
            "sae_id must be made of letters, digits, '_', '.' and single '-', with '/' "
            f"between folders, got {sae_id!r}"
        )


def _load_export(folder: Path) -> MixtureSAE[Any]:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder")
    try:
        sae = SAE.load_from_disk(folder)
        cfg = read_json(folder / SAE_CFG_FILENAME)
    except Exception as error:
        if is_of_the_machine(error):
            raise
        # Few of these name the file.
        raise ValueError(
            f"{folder} cannot be loaded: {type(error).__name__}: {error}"
        ) from error
    architecture = sae.cfg.architecture()
    if not isinstance(sae, MixtureSAE):
        raise ValueError(
            f"{folder} holds a {architecture!r} SAE, which "
            "sae_lens.upload_saes_to_huggingface uploads"
        )
    training_fields = {f.name for f in fields(get_sae_training_class(architecture)[1])}
    if cfg.keys() & (training_fields - {f.name for f in fields(sae.cfg)}):
        raise ValueError(
            f"{folder} holds a training checkpoint; upload the export, which the runner "
            "leaves in its output_path"
        )
    return sae


def _metrics(
    sae: MixtureSAE[Any], folder: Path, path: str | Path | None
) -> list[dict[str, Any]]:
    """Results of ``evaluate`` for the SAE, one for each evaluation."""
    if path is None:
        path = folder / METRICS_FILENAME
        if not path.exists():
            return []
    path = Path(path)
    try:
        content = read_json(path)
        results = content if isinstance(content, list) else [content]
        evaluated = [_comparable(result["sae_cfg"]) for result in results]
        for result in results:
            dict(result.get("eval_cfg", {}))
            for group in result["metrics"].values():
                dict(group)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"metrics: {path} must be JSON that sae-lens-scale evaluate --output wrote"
        ) from error
    ours = _comparable(sae.cfg.to_dict())
    matching = [r for r, cfg in zip(results, evaluated, strict=True) if cfg == ours]
    if not matching:
        raise ValueError(f"metrics: {path} is about another SAE than {folder}")
    return matching


def _comparable(cfg: dict[str, Any]) -> dict[str, Any]:
    # As JSON holds it, and where and how precisely the SAE was evaluated aside.
    cfg = json.loads(dump_json(cfg))
    return {name: v for name, v in cfg.items() if name not in ("device", "dtype")}


def _card(repo_id: str) -> ModelCard:
    """The repository's card, or a new one."""
    try:
        return ModelCard.load(repo_id)
    except (EntryNotFoundError, RepositoryNotFoundError):
        title = f"# {repo_id.split('/')[1]}"
        intro = "Sparse autoencoders for [SAELens](https://github.com/decoderesearch/SAELens)."
        return ModelCard(f"---\nlibrary_name: saelens\n---\n{title}\n\n{intro}\n")


def _insert(card: ModelCard, sae_id: str, section: str) -> None:
    """Put an SAE's section in the place of its earlier one, or at the end."""
    begin, end = f"<!-- sae {sae_id} -->", "<!-- end -->"
    marked = f"{begin}\n{section}\n{end}"
    earlier = re.compile(f"{re.escape(begin)}.*?{end}", re.DOTALL)
    if earlier.search(card.text):
        card.text = earlier.sub(lambda _: marked, card.text, count=1)
    else:
        card.text = f"{card.text.rstrip()}\n\n{marked}\n"


def _section(
    sae: MixtureSAE[Any],
    folder: Path,
    repo_id: str,
    sae_id: str,
    metrics: list[dict[str, Any]],
) -> str:
    cfg, metadata = sae.cfg, sae.cfg.metadata
    architecture = cfg.architecture()
    runner_cfg = folder / RUNNER_CFG_FILENAME
    run = read_json(runner_cfg) if runner_cfg.exists() else {}
    trained = {name: run[name] for name in _RUN if name in run}
    trained |= metadata.training_architecture_details or {}
    hook, model, text = (
        f"`{metadata[name]}`" if metadata[name] else f"unknown ({name})"
        for name in ("hook_name", "model_name", "dataset_path")
    )
    # An architecture of the user's own has none here.
    paper = f" Paper: {_PAPERS[architecture]}." if architecture in _PAPERS else ""
    paragraphs = [
        f"## {sae_id}",
        f"A {architecture.title()} SAE (mixture of experts) for {hook} of {model}, trained "
        f"on {text}.{paper}",
        "With the package `sae-lens-scale` installed, which makes the architecture known to "
        "SAELens:",
        f"""```python
import sae_lens_scale
from sae_lens import SAE

sae = SAE.from_pretrained("{repo_id}", "{sae_id}")
```""",
        _table(
            "size",
            {
                "d_in": cfg.d_in,
                "d_sae": cfg.d_sae,
                "experts (num_experts)": cfg.num_experts,
                "experts per token (experts_per_token)": cfg.experts_per_token,
                "of these shared (num_shared_experts)": cfg.num_shared_experts,
                "active latents per token (k)": cfg.k,
                "gate": cfg.gate,
            },
        ),
    ]
    if trained:
        paragraphs.append(_table("trained with", trained))
    for result in metrics:
        evaluated_on = result.get("eval_cfg", {}).get("dataset")
        values = {
            name: f"{value:.6g}" if isinstance(value, float) else value
            for group in result["metrics"].values()
            for name, value in group.items()
        }
        on_text = f" on `{evaluated_on}`" if evaluated_on else ""
        paragraphs.append(_table(f"measured by SAELens's evaluation{on_text}", values))
    return "\n\n".join(paragraphs)


def _table(title: str, values: dict[str, Any]) -> str:
    rows = [f"| {name} | {value} |" for name, value in values.items()]
    return "\n".join([f"| {title} | |", "|---|---|", *rows])
