"""Checkpoints of the authors' code compute the same here as there."""

import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_close, files_no_larger_than
from huggingface_hub.errors import EntryNotFoundError
from integration.hub import Hub, running_hub
from sae_lens import SAE
from sae_lens.saes.sae import TrainingSAE
from safetensors import SafetensorError
from safetensors.torch import save_file

from sae_lens_scale import ScaleSAE, SwitchSAE
from sae_lens_scale.loading import (
    authors_disk_loader,
    authors_huggingface_loader,
    convert_authors_checkpoint,
)

State = dict[str, torch.Tensor]
D, N, SIZE = 16, 4, 10
# Experts per token.
FORMATS = {"switch": 1, "mixture": 2, "scale": 2}
SETTINGS = {"k": 5, "experts_per_token": 2, "heaviside": False}


def make_state(
    kind: str, d: int = D, num_experts: int = N, size: int = SIZE, seed: int = 0
) -> State:
    """A random checkpoint in float64, as the authors' code would name its tensors."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        noise = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return noise / d**0.5 if len(shape) == 2 else noise

    state = {"b_dec": random(d)}
    if kind == "switch":
        # Their trainer starts both from one tensor, and goes on sharing its memory.
        state["b_router"] = state["b_dec"]
        state["router.weight"] = random(num_experts, d)
        state["encoder.weight"] = random(num_experts * size, d)
        state["decoder"] = random(num_experts * size, d)
        return state
    state["b_gate"] = random(d)
    state["gate.weight"] = random(num_experts, d)
    state["gate.bias"] = random(num_experts)
    for i in range(num_experts):
        state[f"expert_modules.{i}.encoder.weight"] = random(size, d)
        state[f"expert_modules.{i}.encoder.bias"] = random(size)
        state[f"expert_modules.{i}.decoder"] = random(size, d)
    if kind == "scale":
        state["omega"] = random(num_experts)
        state["beta"] = torch.zeros(num_experts, dtype=torch.float64)
        state["lp_transform_encoder.weight"] = random(d, d)
        state["lp_transform_decoder.weight"] = torch.eye(d, dtype=torch.float64)
    return state


def their_result(
    state: State, x: torch.Tensor, k: int, e: int, heaviside: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and output of their forward pass, token by token in float64."""
    s = {name: tensor.double() for name, tensor in state.items()}
    if "router.weight" in s:
        logits = (x - s["b_router"]) @ s["router.weight"].T
        encoders = s["encoder.weight"].chunk(logits.shape[-1])
        biases = [torch.zeros(len(encoder)).double() for encoder in encoders]
        decoder = s["decoder"]
    else:
        logits = (x - s["b_gate"]) @ s["gate.weight"].T + s["gate.bias"]
        parts = [f"expert_modules.{i}" for i in range(logits.shape[-1])]
        encoders = [s[f"{part}.encoder.weight"] for part in parts]
        biases = [s[f"{part}.encoder.bias"] for part in parts]
        decoder = torch.cat([s[f"{part}.decoder"] for part in parts])
    p = logits.softmax(-1)
    size = len(encoders[0])
    features = torch.zeros(len(x), len(decoder), dtype=torch.float64)
    for t in range(len(x)):
        chosen = p[t].topk(e)
        if heaviside:
            gates = torch.ones(e).double()
        elif "router.weight" in s:
            gates = chosen.values
        else:
            gates = chosen.values.softmax(-1)
        for gate, i in zip(gates, chosen.indices.tolist(), strict=True):
            W = encoders[i]
            if "omega" in s:
                low = s["lp_transform_encoder.weight"] @ W.mean(0)
                W = low + (1 + s["omega"][i]) * (W - low)
            acts = (W @ (x[t] - s["b_dec"]) + biases[i]).relu()
            features[t, i * size : (i + 1) * size] = gate * acts
    kept = features.topk(k)
    features = torch.zeros_like(features).scatter(-1, kept.indices, kept.values)
    return features, features @ decoder + s["b_dec"]


def tokens(d: int = D, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(32, d, generator=generator, dtype=torch.float64) + 1


def write(
    folder: Path,
    state: dict[str, Any],
    dtype: torch.dtype = torch.float64,
    trainer: dict[str, Any] | None = None,
    buffer: dict[str, Any] | None = None,
) -> Path:
    """Save a checkpoint, and a config.json if there is something to say in it."""
    folder.mkdir(parents=True, exist_ok=True)
    converted: dict[int, torch.Tensor] = {}  # tensors that are shared stay so
    torch.save(
        {name: converted.setdefault(id(t), t.to(dtype)) for name, t in state.items()},
        folder / "ae.pt",
    )
    if trainer is not None:
        config = {"trainer": trainer, "buffer": buffer or {}}
        (folder / "config.json").write_text(json.dumps(config))
    return folder / "ae.pt"


def load(path: Path, dtype: str | None = None, **settings: Any) -> Any:
    converter = partial(authors_disk_loader, **{**SETTINGS, **settings})
    return SAE.load_from_disk(path, dtype=dtype, converter=converter)


def assert_computes(
    sae: SAE[Any], state: State, k: int, e: int, heaviside: bool, atol: float
) -> None:
    x = tokens(sae.cfg.d_in)
    features, out = their_result(state, x, k, e, heaviside)
    assert features.count_nonzero() > len(x)
    assert_close(sae.encode(x).double(), features, atol)
    assert_close(sae(x).double(), out, atol)
    assert_close(sae(x.view(2, -1, x.shape[-1])).double().flatten(0, 1), out, atol)


@pytest.mark.parametrize("heaviside", [False, True])
@pytest.mark.parametrize(
    ("dtype", "atol"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)],
)
@pytest.mark.parametrize(
    ("kind", "d", "num_experts", "size", "e", "k"),
    [
        ("switch", 16, 4, 10, 1, 5),
        ("switch", 8, 12, 6, 1, 6),
        ("switch", 16, 4, 10, 1, 25),  # more than an expert has
        ("mixture", 16, 4, 10, 1, 5),
        ("mixture", 24, 12, 4, 3, 9),
        ("mixture", 16, 4, 10, 4, 3),
        ("mixture", 6, 7, 4, 2, 3),  # as many experts as a centre can express
        ("mixture", 6, 1, 12, 1, 3),
        ("scale", 16, 4, 10, 2, 5),
        ("scale", 24, 6, 8, 1, 8),
        ("scale", 24, 6, 8, 3, 30),  # more than three experts have
    ],
)
def test_outputs_are_those_of_the_authors_forward(
    tmp_path: Path,
    kind: str,
    d: int,
    num_experts: int,
    size: int,
    e: int,
    k: int,
    dtype: torch.dtype,
    atol: float,
    heaviside: bool,
):
    state = make_state(kind, d, num_experts, size)
    path = write(tmp_path, state, dtype)
    sae = load(path, k=k, experts_per_token=e, heaviside=heaviside)
    assert isinstance(sae, SwitchSAE if kind == "switch" else ScaleSAE)
    assert sae.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    stored = {name: tensor.to(dtype) for name, tensor in state.items()}
    assert_computes(sae, stored, k, e, heaviside, atol)


@pytest.mark.parametrize("kind", FORMATS)
def test_tensors_of_safetensors_load_alike(tmp_path: Path, kind: str):
    state, e = make_state(kind), FORMATS[kind]
    path = tmp_path / "8.safetensors"
    save_file({name: tensor.clone() for name, tensor in state.items()}, path)
    assert_computes(load(path, experts_per_token=e), state, 5, e, False, 1e-12)


@pytest.mark.parametrize("kind", FORMATS)
def test_config_beside_the_file_says_what_is_not_in_it(tmp_path: Path, kind: str):
    state, e = make_state(kind), 1 if kind == "switch" else 3
    trainer = {
        "activation_dim": D,
        "dict_size": N * SIZE,
        "experts": N,
        "k": 7,
        "heaviside": True,
        "lm_name": "somebody/gpt2",
        "layer": 8,
        "submodule_name": None,
    }
    if kind != "switch":
        trainer["e"] = e
    path = write(tmp_path / "run", state, trainer=trainer, buffer={"ctx_len": 128})
    checkpoint = tmp_path / "run" / "checkpoints" / "ae_100.pt"
    checkpoint.parent.mkdir()
    checkpoint.write_bytes(path.read_bytes())
    for place in (path, path.parent, checkpoint, checkpoint.parent):
        sae = SAE.load_from_disk(place, converter=authors_disk_loader)
        assert_computes(sae, state, 7, e, True, 1e-12)
        assert sae.cfg.metadata.model_name == "gpt2"
        assert sae.cfg.metadata.hook_name == "blocks.8.hook_resid_post"
        assert sae.cfg.metadata.context_size == 128
        # The same values, given as well.
        load(place, k=7, experts_per_token=e, heaviside=True)


@pytest.mark.parametrize(
    ("trainer", "buffer"),
    [
        ({"layer": 8, "submodule_name": "mlp_8"}, {}),
        ({"layer": 8}, {"io": "in"}),
        ({"layer": None}, {}),
    ],
)
def test_a_hook_that_is_not_certain_is_left_to_the_user(
    tmp_path: Path, trainer: dict[str, Any], buffer: dict[str, Any]
):
    path = write(tmp_path, make_state("scale"), trainer=trainer, buffer=buffer)
    assert load(path).cfg.metadata.hook_name is None
    metadata = load(path, hook_name="blocks.8.hook_mlp_out", model_name="gpt2-small")
    assert metadata.cfg.metadata.hook_name == "blocks.8.hook_mlp_out"
    assert metadata.cfg.metadata.model_name == "gpt2-small"


@pytest.mark.parametrize(
    ("trainer", "given", "message"),
    [
        ({}, {"k": None}, "k is needed"),
        ({}, {"experts_per_token": None}, "experts_per_token is needed"),
        ({}, {"heaviside": None}, "heaviside is needed"),
        (None, {"heaviside": None}, "heaviside is needed"),
        ({"k": 6}, {}, "k must be 6 .* got 5"),
        ({"e": 1}, {}, "experts_per_token must be 1 .* got 2"),
        ({"heaviside": True}, {}, "heaviside must be True .* got False"),
        ({"experts": 8}, {}, "experts is 8 .* but 4"),
        ({"dict_size": 41}, {}, "dict_size is 41 .* but 40"),
        ({"activation_dim": 12}, {}, "activation_dim is 12 .* but 16"),
        ({"k": "5"}, {"k": None}, "k must be of type int, got '5'"),
        ({}, {"k": True}, "k must be of type int, got True"),
        ({}, {"k": 5.0}, "k must be of type int, got 5.0"),
        ({}, {"heaviside": 0}, "heaviside must be of type bool, got 0"),
        ({}, {"heaviside": "False"}, "heaviside must be of type bool, got 'False'"),
        ({}, {"k": 0}, "k must be a positive integer, got 0"),
        ({}, {"k": 41}, "k must be at most d_sae=40, got 41"),
        ({}, {"experts_per_token": 0}, "experts_per_token must be a positive"),
        ({}, {"experts_per_token": 5}, "experts_per_token must be at most"),
    ],
)
def test_values_that_are_missing_wrong_or_contradictory_are_refused(
    tmp_path: Path, trainer: dict[str, Any] | None, given: dict[str, Any], message: str
):
    path = write(tmp_path, make_state("scale"), trainer=trainer)
    with pytest.raises(ValueError, match=message):
        load(path, **given)


def test_a_switch_sae_of_several_experts_per_token_is_refused(tmp_path: Path):
    path = write(tmp_path, make_state("switch"))
    with pytest.raises(ValueError, match="experts_per_token must be 1"):
        load(path, experts_per_token=2)
    assert load(path, experts_per_token=None).cfg.k == SETTINGS["k"]


def test_a_config_that_is_no_json_is_refused(tmp_path: Path):
    path = write(tmp_path, make_state("scale"))
    (tmp_path / "config.json").write_text("k: 5")
    with pytest.raises(ValueError, match="config.json is not JSON"):
        load(path)


@pytest.mark.parametrize("content", ["[]", '{"trainer": 3}', '{"k": 7}'])
def test_somebody_elses_config_is_ignored(tmp_path: Path, content: str):
    path = write(tmp_path, make_state("scale"))
    (tmp_path / "config.json").write_text(content)
    assert load(path).cfg.k == SETTINGS["k"]


SPOILED = [
    ("switch", "router.weight", None, "of no known format"),
    ("switch", "b_dec", None, "missing: b_dec"),
    ("switch", "encoder.bias", torch.ones(40), "unknown: encoder.bias"),
    ("switch", "decoder", torch.ones(40, 15), r"\[40, 16\], got \[40, 15\]"),
    ("switch", "encoder.weight", torch.ones(16, 40), r"\[M, 16\], got \[16, 40\]"),
    ("switch", "router.weight", torch.ones(0, 16), r"\[N, 16\], got \[0, 16\]"),
    # Mudide et al.'s variant with one expert that is always on.
    ("switch", "router.weight", torch.ones(3, 16), "divisible by num_experts"),
    ("switch", "b_router", torch.full((16,), torch.nan), "b_router .* finite"),
    ("mixture", "b_gate", None, "missing: b_gate"),
    ("mixture", "expert_modules.3.decoder", None, "missing: expert_modules.3.dec"),
    ("mixture", "omega", torch.ones(4), "missing: beta, lp_transform_encoder"),
    ("mixture", "beta", torch.ones(4), "unknown: beta"),
    ("mixture", "gate.weight", torch.ones(5, 16), r"\[4, 16\], got \[5, 16\]"),
    ("mixture", "gate.bias", torch.ones(4, 1), r"\[4\], got \[4, 1\]"),
    ("mixture", "expert_modules.1.encoder.bias", torch.ones(9), r"\[10\], got \[9\]"),
    # Earlier versions: some take TopK of each expert alone.
    ("mixture", "expert_modules.0.decoder.weight", torch.ones(16, 10), "unknown:"),
    ("mixture", "b_dec", torch.ones(16).int(), "b_dec .* got torch.int32"),
    ("mixture", "b_dec", 3, "b_dec .* got int"),
    ("switch", "decoder", torch.ones(40, 16).to_sparse(), "dense .* torch.sparse_coo"),
    ("scale", "omega", torch.ones(4).to_sparse(), "omega must be a dense tensor, got"),
    ("switch", "b_dec", torch.ones(16, device="meta"), "dense tensor, got meta"),
    ("scale", "lp_transform_encoder.weight", torch.ones(16, 4), r"\[16, 16\]"),
    ("scale", "omega", torch.tensor([1, 2, torch.inf, 3]), "omega .* finite"),
    ("scale", "expert_modules.a.decoder", torch.ones(10, 16), "unknown:"),
]


@pytest.mark.parametrize(("kind", "name", "value", "message"), SPOILED)
def test_files_of_other_tensors_are_refused(
    tmp_path: Path, kind: str, name: str, value: Any, message: str
):
    state: dict[str, Any] = make_state(kind)
    if value is None:
        del state[name]
    else:
        state[name] = value
    torch.save(state, tmp_path / "ae.pt")
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "ae.pt", experts_per_token=FORMATS[kind])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": torch.tensor([0, 0, 0.1, 0])}, "scales decoders"),
        ({"lp_transform_decoder.weight": 1.01 * torch.eye(D)}, "scales decoders"),
        ({"omega": torch.zeros(N)}, "removes low-pass parts"),
        ({"omega": torch.tensor([0.3, 0, 0, 0])}, "applies it to all experts"),
    ],
)
def test_versions_that_compute_something_else_under_the_same_names_are_refused(
    tmp_path: Path, changes: State, message: str
):
    path = write(tmp_path, {**make_state("scale"), **changes})
    with pytest.raises(ValueError, match=message):
        load(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"omega": torch.tensor([0, 0.2, 0, 0])},
        {"omega": torch.zeros(N), "lp_transform_encoder.weight": torch.eye(D)},
    ],
)
def test_scale_saes_with_untrained_parts_load(tmp_path: Path, changes: State):
    state = {**make_state("scale"), **changes}
    assert_computes(load(write(tmp_path, state)), state, 5, 2, False, 1e-12)


@pytest.mark.parametrize(
    ("d", "num_experts", "difference"),
    [
        (6, 8, None),  # more experts than a centre can express
        (D, N, 0.0),  # two experts that differ in bias only
        (D, N, 1e-5),  # two that hardly differ but in bias
    ],
)
def test_a_router_bias_that_cannot_be_exact_is_refused(
    tmp_path: Path, d: int, num_experts: int, difference: float | None
):
    torch.manual_seed(0)
    state = make_state("mixture", d, num_experts)
    if difference is not None:
        W = state["gate.weight"]
        W[1] = W[0] + difference * torch.randn(d)
    with pytest.raises(ValueError, match="gate.bias cannot be expressed"):
        load(write(tmp_path, state))
    # The same bias for all experts changes nothing, so that it can always be had.
    state["gate.bias"] = torch.full_like(state["gate.bias"], 0.7)
    assert_computes(load(write(tmp_path, state)), state, 5, 2, False, 1e-12)


def test_without_router_bias_the_centre_is_theirs(tmp_path: Path):
    state = make_state("mixture")
    state["gate.bias"].zero_()
    assert torch.equal(load(write(tmp_path, state)).b_router, state["b_gate"])


class Malice:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def test_code_in_a_pickle_is_never_run(tmp_path: Path):
    made = tmp_path / "made"
    path = tmp_path / "ae.pt"
    torch.save({**make_state("scale"), "omega": Malice(made)}, path)
    with pytest.raises(ValueError, match="holds more than tensors"):
        load(path)
    with pytest.raises(ValueError, match="holds more than tensors"):
        convert_authors_checkpoint(path, tmp_path / "converted", **SETTINGS)
    assert not made.exists()
    torch.load(path, weights_only=False)
    assert made.exists(), "the pickle was harmless, and the test proves nothing"


@pytest.mark.parametrize("name", ["ae.pt", "ae.safetensors"])
def test_damaged_files_are_refused(tmp_path: Path, name: str):
    path = tmp_path / name
    (torch.save if path.suffix == ".pt" else save_file)(make_state("scale"), path)
    whole = path.read_bytes()
    pickle, archive = b"\x80\x02]q", b"PK\x03\x04"
    for content in (whole[: len(whole) // 2], b"", b"no checkpoint", pickle, archive):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is damaged"):
            load(path)


def test_a_file_of_something_else_is_refused(tmp_path: Path):
    path = tmp_path / "ae.pt"
    torch.save(torch.ones(3), path)
    with pytest.raises(ValueError, match="must hold a state dict, got Tensor"):
        load(path)
    torch.save({"W_enc": torch.ones(3), 7: "x"}, path)
    with pytest.raises(ValueError, match="of no known format.*W_enc, 7") as refusal:
        load(path)
    assert str(path) in str(refusal.value)


def test_a_folder_must_make_clear_which_file_is_meant(tmp_path: Path):
    with pytest.raises(ValueError, match=r"path must be .* with \[\]"):
        load(tmp_path)
    path = write(tmp_path, make_state("scale"))
    path.rename(tmp_path / "8.pt")
    # A folder is none.
    (tmp_path / "7.pt").mkdir()
    load(tmp_path)
    (tmp_path / "9.pt").write_bytes((tmp_path / "8.pt").read_bytes())
    with pytest.raises(ValueError, match=r"with \['8.pt', '9.pt'\]"):
        load(tmp_path)
    (tmp_path / "8.pt").rename(tmp_path / "ae.pt")
    load(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load(tmp_path / "nowhere")


def test_dtype_and_device_are_the_callers(tmp_path: Path):
    state = make_state("scale")
    path = write(tmp_path, state)
    sae = load(path, dtype="float32")
    assert sae.dtype == torch.float32
    assert {p.dtype for p in sae.parameters()} == {torch.float32}
    assert_computes(sae, state, 5, 2, False, 1e-5)
    cfg, tensors = authors_disk_loader(path, "meta", **SETTINGS)
    assert cfg["device"] == "meta"
    assert {tensor.device.type for tensor in tensors.values()} == {"meta"}


def test_biases_that_share_memory_in_the_file_are_apart_in_the_sae(tmp_path: Path):
    path = write(tmp_path, make_state("switch"))
    shared = torch.load(path)
    assert shared["b_dec"].data_ptr() == shared["b_router"].data_ptr()
    sae = load(path, experts_per_token=1)
    x = tokens()
    before = sae(x)
    sae.fold_activation_norm_scaling_factor(4.0)
    assert_close(sae(x / 4), before / 4)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_converted_folder_loads_and_trains_on_like_any_other(
    tmp_path: Path, kind: str
):
    state, e = make_state(kind), FORMATS[kind]
    source = write(tmp_path / "theirs", state, torch.float32)
    target = tmp_path / "new" / "ours"
    named = {"model_name": "gpt2", "hook_name": "blocks.8.hook_resid_post"}
    settings = {**SETTINGS, "experts_per_token": e, **named}
    assert convert_authors_checkpoint(source, target, **settings) == target
    files = {path.relative_to(target.parent) for path in target.parent.rglob("*.*")}
    assert files == {Path("ours/cfg.json"), Path("ours/sae_weights.safetensors")}
    sae = SAE.load_from_disk(target)
    direct = load(source, experts_per_token=e)
    assert type(sae) is type(direct)
    x = tokens().float()
    assert torch.equal(sae.encode(x), direct.encode(x))
    assert torch.equal(sae(x), direct(x))
    metadata = sae.cfg.metadata
    assert {name: metadata[name] for name in named} == named
    omega = state["omega"].float().tolist() if kind == "scale" else None
    assert metadata.get("omega") == omega
    training = TrainingSAE.load_from_disk(target)
    assert torch.equal(training.encode(x), direct.encode(x))


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path):
    source = write(tmp_path / "theirs", make_state("scale"))
    parent = tmp_path / "new"
    with pytest.raises(ValueError, match="k is needed"):
        convert_authors_checkpoint(source, parent / "ours")
    assert not parent.exists()
    # A disk that is full half-way through the weights.
    with files_no_larger_than(4096), pytest.raises((OSError, SafetensorError)):
        convert_authors_checkpoint(source, parent / "ours", **SETTINGS)
    assert list(parent.iterdir()) == []


def test_a_conversion_replaces_nothing(tmp_path: Path):
    source = write(tmp_path / "theirs", make_state("scale"))
    target = tmp_path / "ours"
    target.mkdir()
    with pytest.raises(ValueError, match="target must not exist yet"):
        convert_authors_checkpoint(source, target, **SETTINGS)
    assert list(target.iterdir()) == []


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with running_hub(tmp_path / "client") as hub:
        yield hub


@pytest.mark.parametrize("kind", FORMATS)
def test_checkpoints_load_from_the_hub(tmp_path: Path, hub: Hub, kind: str):
    state, e = make_state(kind), FORMATS[kind]
    trainer = {"k": 5, "e": e, "heaviside": False, "lm_name": "gpt2", "layer": 8}
    path = write(tmp_path / "with", state, torch.float32, trainer)
    hub.put("somebody/saes", path.parent, "with")
    hub.put("somebody/saes", write(tmp_path / "w/o", state).parent, "without")
    hub.repos["somebody/saes"]["run/checkpoints/ae_7.pt"] = path.read_bytes()
    config = (path.parent / "config.json").read_bytes()
    hub.repos["somebody/saes"]["run/config.json"] = config
    given = {**SETTINGS, "experts_per_token": e}
    for sae_id, settings in (
        ("with", {}),
        ("with/ae.pt", {}),
        ("without", given),
        ("run/checkpoints/ae_7.pt", {}),
    ):
        sae = SAE.from_pretrained(
            "somebody/saes",
            sae_id,
            converter=partial(authors_huggingface_loader, **settings),
        )
        assert_computes(sae, state, 5, e, False, 1e-5)
        expected = None if settings else "blocks.8.hook_resid_post"
        assert sae.cfg.metadata.hook_name == expected
    with pytest.raises(ValueError, match="heaviside must be False"):
        authors_huggingface_loader("somebody/saes", "with", heaviside=True)
    with pytest.raises(ValueError, match="k is needed"):
        authors_huggingface_loader("somebody/saes", "without")
    with pytest.raises(EntryNotFoundError):
        authors_huggingface_loader("somebody/saes", "nowhere", **SETTINGS)


def test_a_hub_is_asked_again_only_if_told_to(tmp_path: Path, hub: Hub):
    path = write(tmp_path / "here", make_state("scale"))
    hub.put("somebody/saes", path.parent, "here")
    for force, downloads in ((False, 1), (False, 1), (True, 2)):
        authors_huggingface_loader(
            "somebody/saes", "here", force_download=force, **SETTINGS
        )
        assert hub.downloads().count("ae.pt") == downloads
