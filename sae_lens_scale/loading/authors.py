"""
Checkpoints of the authors' code, as SAEs that SAELens loads.

Each is a state dict in a file of ``torch.save`` (``ae.pt``), in one of three formats:

- Switch SAE of Mudide et al. (https://github.com/amudide/switch_sae): ``encoder.weight``
  and ``decoder`` ``[d_sae, d_in]``, ``router.weight`` ``[num_experts, d_in]``, ``b_dec``
  and ``b_router`` ``[d_in]``;
- the mixture without feature scaling of the Scale SAE authors
  (https://github.com/shahinxu/Scale-Sparse-Autoencoder): for every expert i
  ``expert_modules.{i}.encoder.weight`` and ``expert_modules.{i}.decoder``
  ``[expert_size, d_in]``, ``expert_modules.{i}.encoder.bias`` ``[expert_size]``;
  ``gate.weight`` ``[num_experts, d_in]``, ``gate.bias`` ``[num_experts]``, ``b_gate``
  and ``b_dec`` ``[d_in]``;
- their Scale SAE: the same, ``omega`` and ``beta`` ``[num_experts]``, and
  ``lp_transform_encoder.weight`` and ``lp_transform_decoder.weight`` ``[d_in, d_in]``.

k, the experts per token and "heaviside" are not in it. The authors' training code leaves
them in a ``config.json`` beside it; without that file they have to be given.

What is loaded computes what their code computes, up to rounding: TopK ranks gated
activations; omega and the learned low-pass map are folded into the encoder; ``gate.bias``,
a bias on the router's logits, is folded into the router's centre. Two things cannot be
told from a file: which experts their code selects for a token where several probabilities
round to the same number, and, without a config.json, that a Switch SAE is of the variant
with one more expert that is always on.
"""

import tempfile
from contextlib import suppress
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from sae_lens import SAE
from sae_lens.saes.sae import SAEMetadata
from sae_lens.util import str_to_dtype

from sae_lens_scale.saes import ScaleSAEConfig, SwitchSAEConfig
from sae_lens_scale.saes.mixture.feature_scaling import scaled_encoder

from .authors_files import (
    WEIGHTS_SUFFIXES,
    check_tensors,
    config_paths,
    find_weights,
    read_config,
    read_tensors,
)


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
        device: Where to put the tensors.
        cfg_overrides: Fields of the config that are to differ, such as dtype. By
            default the SAE is float64 if the file is, else float32.
        k: Number of latents kept per token.
        experts_per_token: Number of experts that each token selects; 1 for Switch SAE.
        heaviside: Whether the gates are 1.
        model_name: For the metadata; by default what config.json names.
        hook_name: For the metadata. By default the output of the layer that config.json
            names, which is what the authors' scripts train on.

    Returns:
        Config and state dict of a "scale" or "switch" inference SAE.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is none of the formats, if a value is neither in
            config.json nor given, or contradicts it, or if the SAE cannot be expressed
            exactly.
    """
    weights = find_weights(Path(path))
    state = read_tensors(weights)
    sizes = check_tensors(state, weights)
    config_path = next((p for p in config_paths(weights) if p.is_file()), None)
    config = {} if config_path is None else read_config(config_path)
    trainer, buffer = _section(config, "trainer"), _section(config, "buffer")
    for name, size in (
        ("activation_dim", sizes["d"]),
        ("dict_size", sizes["M"]),
        ("experts", sizes["N"]),
    ):
        if trainer.get(name) not in (None, size):
            raise ValueError(
                f"{name} is {trainer[name]!r} in {config_path}, but {size} in {weights}"
            )

    is_switch = "router.weight" in state
    if is_switch:
        trainer["e"] = 1
    latents: int = _setting("k", k, trainer.get("k"), int, weights)
    experts: int = _setting(
        "experts_per_token", experts_per_token, trainer.get("e"), int, weights
    )
    uniform: bool = _setting(
        "heaviside", heaviside, trainer.get("heaviside"), bool, weights
    )
    if latents > sizes["M"]:
        raise ValueError(f"k must be at most d_sae={sizes['M']}, got {latents}")

    context_size = buffer.get("ctx_len")
    metadata = {
        "model_name": model_name or _model_name(trainer),
        "hook_name": hook_name or _hook_name(trainer, buffer),
        "context_size": context_size if type(context_size) is int else None,
        "omega": state["omega"].tolist() if "omega" in state else None,
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
    if is_switch:
        cfg = SwitchSAEConfig(**fields, gate="uniform" if uniform else "softmax")
    else:
        cfg = ScaleSAEConfig(
            **fields,
            experts_per_token=experts,
            gate="uniform" if uniform else "double_softmax",
        )
    cfg_dict = {**cfg.to_dict(), **(cfg_overrides or {})}
    converted = _convert_switch(state) if is_switch else _convert_mixture(state)
    dtype = str_to_dtype(cfg_dict["dtype"])
    # Copies, because b_dec and the router's centre share their memory in such a file.
    return cfg_dict, {
        name: tensor.to(cfg_dict["device"], dtype).clone(
            memory_format=torch.contiguous_format
        )
        for name, tensor in converted.items()
    }


def authors_huggingface_loader(
    repo_id: str,
    folder_name: str,
    device: str = "cpu",
    force_download: bool = False,
    cfg_overrides: dict[str, Any] | None = None,
    *,
    k: int | None = None,
    experts_per_token: int | None = None,
    heaviside: bool | None = None,
    model_name: str | None = None,
    hook_name: str | None = None,
) -> tuple[dict[str, Any], dict[str, torch.Tensor], None]:
    """
    Load one from the Hugging Face hub; a ``converter`` of ``SAE.from_pretrained``.

    Args:
        repo_id: Repository, ``owner/name``.
        folder_name: What ``from_pretrained`` calls ``sae_id``: path in the repository of
            the file, or of a folder with an ``ae.pt``.
        device: Where to put the tensors.
        force_download: Whether to download what is cached already.
        cfg_overrides: As for :func:`authors_disk_loader`; so are the arguments below.
        k: Number of latents kept per token.
        experts_per_token: Number of experts that each token selects.
        heaviside: Whether the gates are 1.
        model_name: For the metadata.
        hook_name: For the metadata.

    Returns:
        Config and state dict of a "scale" or "switch" inference SAE, and no sparsity.

    Raises:
        EntryNotFoundError: If the repository has no such file.
        ValueError: As :func:`authors_disk_loader` does.
    """
    weights = PurePosixPath(folder_name)
    if weights.suffix not in WEIGHTS_SUFFIXES:
        weights /= "ae.pt"
    for path in config_paths(weights):
        with suppress(EntryNotFoundError):
            hf_hub_download(repo_id, str(path), force_download=force_download)
            break
    # It lies beside the weights now, and is read from there.
    downloaded = hf_hub_download(repo_id, str(weights), force_download=force_download)
    cfg_dict, state_dict = authors_disk_loader(
        downloaded,
        device,
        cfg_overrides,
        k=k,
        experts_per_token=experts_per_token,
        heaviside=heaviside,
        model_name=model_name,
        hook_name=hook_name,
    )
    return cfg_dict, state_dict, None


def convert_authors_checkpoint(
    source: str | Path,
    target: str | Path,
    *,
    k: int | None = None,
    experts_per_token: int | None = None,
    heaviside: bool | None = None,
    model_name: str | None = None,
    hook_name: str | None = None,
) -> Path:
    """
    Write a checkpoint of the authors' code as a folder that SAELens loads, whole or not
    at all.

    Args:
        source: The file or its folder, and the other arguments, as for
            :func:`authors_disk_loader`.
        target: Folder to create.
        k: Number of latents kept per token.
        experts_per_token: Number of experts that each token selects.
        heaviside: Whether the gates are 1.
        model_name: For the metadata.
        hook_name: For the metadata.

    Returns:
        The folder, with ``cfg.json`` and ``sae_weights.safetensors``.

    Raises:
        FileNotFoundError: If there is no such source.
        ValueError: If the target exists, or as :func:`authors_disk_loader` does.
    """
    target = Path(target)
    if target.exists():
        raise ValueError(f"target must not exist yet, got {target}")
    converter = partial(
        authors_disk_loader,
        k=k,
        experts_per_token=experts_per_token,
        heaviside=heaviside,
        model_name=model_name,
        hook_name=hook_name,
    )
    sae = SAE.load_from_disk(source, converter=converter)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix=".converting-", dir=target.parent
    ) as temporary:
        whole = Path(temporary, target.name)
        sae.save_model(whole)
        whole.rename(target)
    return target


def _section(config: dict[str, Any], name: str) -> dict[str, Any]:
    section = config.get(name)
    return dict(section) if isinstance(section, dict) else {}


def _setting(name: str, given: Any, stored: Any, kind: type, path: Path) -> Any:
    """A value that is given, in config.json, or both and the same."""
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


def _convert_switch(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        "W_enc": state["encoder.weight"].T,
        "b_enc": state["encoder.weight"].new_zeros(len(state["encoder.weight"])),
        "W_dec": state["decoder"],
        "b_dec": state["b_dec"],
        "W_router": state["router.weight"].T,
        "b_router": state["b_router"],
    }


def _convert_mixture(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    def joined(name: str) -> torch.Tensor:
        experts = range(len(state["gate.bias"]))
        return torch.cat([state[f"expert_modules.{i}.{name}"] for i in experts])

    W_enc = joined("encoder.weight").T
    if "omega" in state:
        W_enc = scaled_encoder(
            W_enc.double(),
            state["omega"].double(),
            "learned",
            state["lp_transform_encoder.weight"].double(),
        )
    W_router = state["gate.weight"].T
    shift = _input_shift(W_router.double(), state["gate.bias"].double())
    return {
        "W_enc": W_enc,
        "b_enc": joined("encoder.bias"),
        "W_dec": joined("decoder"),
        "b_dec": state["b_dec"],
        "W_router": W_router,
        "b_router": state["b_gate"].double() - shift,
    }


def _input_shift(W_router: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """
    The smallest shift of a router's input that changes its logits as a bias does.

    Args:
        W_router: Router weights, ``[d_in, num_experts]``, float64.
        bias: Bias on the logits, ``[num_experts]``, float64.

    Returns:
        ``[d_in]``. Its product with ``W_router`` is ``bias`` up to a constant, which
        softmax does not see.

    Raises:
        ValueError: If there is no such shift, or only one so large that the router
            would compute something else in float32.
    """
    centred = W_router - W_router.mean(dim=1, keepdim=True)
    wanted = bias - bias.mean()
    solution = torch.linalg.lstsq(centred.T, wanted.unsqueeze(1), driver="gelsd")
    shift = solution.solution.squeeze(1)
    missed = (shift @ centred - wanted).abs().max() / wanted.abs().max().clamp(min=1)
    # Bounds how far rounding of the shifted input moves a logit.
    rounding = (shift.abs() @ W_router.abs()).max() * torch.finfo(torch.float32).eps
    if missed > 1e-9 or rounding > 1e-5:
        raise ValueError(
            "gate.bias cannot be expressed by the router's centre: as a shift of the "
            f"router's input it misses logits by {missed:.1e} (relative) and float32 "
            f"would round them by up to {rounding:.1e}"
        )
    return shift
