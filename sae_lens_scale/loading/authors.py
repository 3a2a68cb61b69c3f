"""
Checkpoints of the authors' code, as SAEs that SAELens loads.

Each is a state dict in a file of ``torch.save`` (``ae.pt``), or the same tensors as
``.safetensors``, in one of the formats of :mod:`sae_lens_scale.loading.formats`. It does not
hold k, the experts per token and "heaviside". The authors' training code leaves them in a
``config.json`` beside it; without that file they have to be given.

A loaded SAE computes the same as their code, up to rounding: TopK ranks gated activations,
and parameters that this package's SAEs lack are folded into others. Two things cannot be
told from a file: which experts their code selects for a token where several probabilities
round to the same number, and, without a config.json, that a Switch SAE is of the variant
with one more expert that is always on.
"""

import tempfile
from contextlib import suppress
from functools import partial
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from sae_lens import SAE
from sae_lens.saes.sae import SAEMetadata
from sae_lens.util import str_to_dtype
from safetensors.torch import load_file

from sae_lens_scale.files import read_json, require_writable

from .errors import is_of_the_machine
from .formats import recognise

_WEIGHTS_SUFFIXES = (".pt", ".safetensors")


def authors_disk_loader(
    path: str | Path,
    device: str = "cpu",
    cfg_overrides: dict[str, Any] | None = None,
    *,
    k: int | None = None,
    experts_per_token: int | None = None,
    heaviside: bool | None = None,
    model_name: str | None = None,
    hook_name: str | None = None,
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """
    Load a checkpoint of the authors' code; a ``converter`` of ``SAE.load_from_disk``.

    Values that no config.json holds are bound beforehand::

        converter = functools.partial(
            authors_disk_loader, k=32, experts_per_token=2, heaviside=False
        )
        sae = SAE.load_from_disk("dictionaries/8.pt", converter=converter)

    Args:
        path: The file (``.pt``, or the same tensors as ``.safetensors``), or a folder
            with ``ae.pt`` or only one such file in it.
        device: Device of the tensors.
        cfg_overrides: Fields of the config that are to differ, such as dtype. By
            default the SAE is float64 if the file is, else float32.
        k: Number of latents kept per token.
        experts_per_token: Number of experts that each token selects; 1 for Switch SAE.
        heaviside: True if the gates are 1.
        model_name: For the metadata; by default the one that config.json names.
        hook_name: For the metadata. By default the output of the layer that config.json
            names, on which the authors' scripts train.

    Returns:
        Config and state dict of a "scale" or "switch" inference SAE.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is none of the formats, if a value is neither in
            config.json nor given, or contradicts it, or if the SAE cannot be expressed
            exactly.
    """
    weights = _find_weights(Path(path))
    state = _read_tensors(weights)
    try:
        form = recognise(state)
        sizes = form.check(state)
    except ValueError as error:
        raise ValueError(f"{weights}: {error}") from error
    config_path = next(
        (p for p in map(Path, _config_paths(weights)) if p.is_file()), None
    )
    trainer, buffer = _read_config(config_path)
    for name, size in (
        ("activation_dim", sizes["d"]),
        ("dict_size", sizes["M"]),
        ("experts", sizes["N"]),
    ):
        if trainer.get(name) not in (None, size):
            raise ValueError(
                f"{name} is {trainer[name]!r} in {config_path}, but {size} in {weights}"
            )

    if form.experts_per_token is not None:
        trainer["e"] = form.experts_per_token
    latents: int = _setting("k", k, trainer.get("k"), int, weights)
    experts: int = _setting(
        "experts_per_token", experts_per_token, trainer.get("e"), int, weights
    )
    gates_are_1: bool = _setting(
        "heaviside", heaviside, trainer.get("heaviside"), bool, weights
    )
    if latents > sizes["M"]:
        raise ValueError(f"k must be at most d_sae={sizes['M']}, got {latents}")

    context_size = buffer.get("ctx_len")
    metadata = {
        "model_name": model_name or _model_name(trainer),
        "hook_name": hook_name or _hook_name(trainer, buffer),
        "context_size": context_size if type(context_size) is int else None,
        **form.metadata(state),
    }
    is_float64 = any(tensor.dtype == torch.float64 for tensor in state.values())
    fields: dict[str, Any] = {
        "d_in": sizes["d"],
        "d_sae": sizes["M"],
        "num_experts": sizes["N"],
        # Their TopK is over all latents, and those of other experts are zero.
        "k": min(latents, experts * (sizes["M"] // sizes["N"])),
        "topk_over": "gated_activations",
        "dtype": "float64" if is_float64 else "float32",
        "device": device,
        "metadata": SAEMetadata(
            **{name: value for name, value in metadata.items() if value is not None}
        ),
    }
    cfg_dict = form.config(fields, experts, gates_are_1).to_dict()
    cfg_dict |= cfg_overrides or {}
    dtype = str_to_dtype(cfg_dict["dtype"])
    # Copies, because b_dec and the router's centre share their memory in such a file.
    return cfg_dict, {
        name: tensor.to(cfg_dict["device"], dtype).clone(
            memory_format=torch.contiguous_format
        )
        for name, tensor in form.tensors(state).items()
    }


def authors_huggingface_loader(
    repo_id: str,
    folder_name: str,
    device: str = "cpu",
    force_download: bool = False,
    cfg_overrides: dict[str, Any] | None = None,
    **settings: Any,
) -> tuple[dict[str, Any], dict[str, torch.Tensor], None]:
    """
    Load one from the Hugging Face hub; a ``converter`` of ``SAE.from_pretrained``.

    Args:
        repo_id: Repository, ``owner/name``.
        folder_name: The ``sae_id`` of ``from_pretrained``: path in the repository of
            the file, or of a folder with an ``ae.pt``.
        device: Device of the tensors.
        force_download: Download again if it is in the cache.
        cfg_overrides: Fields of the config that are to differ.
        **settings: As for :func:`authors_disk_loader`: k, experts_per_token, heaviside,
            model_name and hook_name.

    Returns:
        As :func:`authors_disk_loader`, and no sparsity.

    Raises:
        EntryNotFoundError: If the repository has no such file.
        ValueError: As :func:`authors_disk_loader`.
    """
    weights = PurePosixPath(folder_name)
    if weights.suffix not in _WEIGHTS_SUFFIXES:
        weights /= "ae.pt"
    for path in _config_paths(weights):
        with suppress(EntryNotFoundError):
            hf_hub_download(repo_id, str(path), force_download=force_download)
            break
    # It lies beside the weights now, and is read from there.
    downloaded = hf_hub_download(repo_id, str(weights), force_download=force_download)
    return *authors_disk_loader(downloaded, device, cfg_overrides, **settings), None


def convert_authors_checkpoint(
    source: str | Path, target: str | Path, **settings: Any
) -> Path:
    """
    Write a checkpoint of the authors' code as a folder that SAELens loads.

    The folder is written whole or not at all.

    Args:
        source: The file or its folder.
        target: Folder to create, with ``cfg.json`` and ``sae_weights.safetensors``.
        **settings: As for :func:`authors_disk_loader`: k, experts_per_token, heaviside,
            model_name and hook_name.

    Raises:
        FileNotFoundError: If there is no such source.
        OSError: If the target cannot be written.
        ValueError: If the target exists, or as :func:`authors_disk_loader`.
    """
    target = Path(target)
    if target.exists():
        raise ValueError(f"target must not exist yet, got {target}")
    require_writable("target", target)
    sae = SAE.load_from_disk(source, converter=partial(authors_disk_loader, **settings))
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix=".converting-", dir=target.parent
    ) as temporary:
        whole = Path(temporary, target.name)
        sae.save_model(whole)
        whole.rename(target)
    return target


def _find_weights(path: Path) -> Path:
    """Find the checkpoint: the file itself, or the only one in a folder."""
    if not path.is_dir():
        return path
    files = [f for f in sorted(path.iterdir()) if f.suffix in _WEIGHTS_SUFFIXES]
    files = [f for f in files if f.is_file()]
    files = [f for f in files if f.stem == "ae"] or files
    if len(files) != 1:
        raise ValueError(
            f"path must be a checkpoint, or a folder with ae.pt or only one checkpoint "
            f"in it, got {path} with {[f.name for f in files]}"
        )
    return files[0]


def _config_paths(weights: PurePath) -> list[PurePath]:
    """Paths at which the authors' training code leaves the config.json of a checkpoint."""
    folders = [weights.parent]
    if weights.parent.name == "checkpoints":
        folders.append(weights.parent.parent)
    return [folder / "config.json" for folder in folders]


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a state dict, without running any code that a pickle may hold."""
    # Opened first, so that a file that is missing or not readable is called that.
    with path.open("rb") as file:
        try:
            if path.suffix == ".safetensors":
                return load_file(path)
            state = torch.load(file, map_location="cpu", weights_only=True)
        # A file that is no pickle ends as any error: KeyError, say.
        except Exception as error:
            if is_of_the_machine(error):
                raise
            raise ValueError(
                f"{path} is damaged, or holds more than tensors, and was not loaded"
            ) from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} must hold a state dict, got {type(state).__name__}")
    return state


def _read_config(path: Path | None) -> list[dict[str, Any]]:
    """Read a config.json's sections "trainer" and "buffer"; empty if there are none."""
    config = {} if path is None else read_json(path)
    config = config if isinstance(config, dict) else {}
    sections = (config.get(name) for name in ("trainer", "buffer"))
    return [dict(s) if isinstance(s, dict) else {} for s in sections]


def _setting(name: str, given: Any, stored: Any, kind: type, path: Path) -> Any:
    """Take a value that is given, in config.json, or both and the same."""
    if given is None and stored is None:
        raise ValueError(
            f"{name} is needed: it is not in {path} and no config.json with it was found"
        )
    if given is not None and stored is not None and given != stored:
        raise ValueError(f"{name} must be {stored!r} for {path}, got {given!r}")
    value = stored if given is None else given
    # Not isinstance: True would be the integer 1.
    if type(value) is not kind:
        raise ValueError(f"{name} must be of type {kind.__name__}, got {value!r}")
    return value


def _model_name(trainer: dict[str, Any]) -> str | None:
    name = trainer.get("lm_name")
    return name.rsplit("/", 1)[-1] if isinstance(name, str) else None


def _hook_name(trainer: dict[str, Any], buffer: dict[str, Any]) -> str | None:
    # A named submodule, or the input of one, may be anything.
    if trainer.get("submodule_name") is not None or buffer.get("io", "out") != "out":
        return None
    layer = trainer.get("layer")
    return f"blocks.{layer}.hook_resid_post" if type(layer) is int else None
