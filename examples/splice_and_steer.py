"""
Splice a trained Scale SAE into its language model, look at it, and steer with it.

Run `make demo` first, or name another SAE with `--sae FOLDER`.
"""

import os
from dataclasses import dataclass
from functools import partial
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from sae_lens import SAE
from simple_parsing import parse

import sae_lens_scale  # noqa: F401
from sae_lens_scale.loading.smollm2 import load_smollm2


@dataclass
class Settings:
    sae: str = "outputs/demo/scale"  # folder of a SAE trained on SmolLM2
    text: str = "I love apples but hate oranges completely."
    strength: float = 20.0  # added to the steered latent
    new_tokens: int = 20


def steer(acts: torch.Tensor, hook: Any, latent: int, strength: float) -> torch.Tensor:
    acts[..., latent] += strength
    return acts


@torch.no_grad()
def main(settings: Settings) -> None:
    sae = SAE.load_from_disk(settings.sae)
    model = load_smollm2()
    hook = sae.cfg.metadata.hook_name
    tokens = model.to_tokens(settings.text)

    # Look: the cache holds the SAE's hooks under the name of the hook it replaces.
    _, cache = model.run_with_cache_with_saes(
        tokens, saes=[sae], exclude_special_tokens=True
    )
    acts = cache[f"{hook}.hook_sae_acts_post"][0, -1]
    experts = cache[f"{hook}.hook_expert_indices"][0, -1]
    latent = int(acts.argmax())
    print(f"experts of the last token: {experts.tolist()}, strongest latent: {latent}")

    # With the error term the spliced model computes the same as the clean one.
    clean = model(tokens)
    spliced = model.run_with_saes(tokens, saes=[sae], use_error_term=True)
    print(f"largest change of a logit by splicing: {(spliced - clean).abs().max():.1e}")

    # Steer: add to one latent at all positions, whether or not its expert is selected.
    model.add_sae(sae, use_error_term=True)
    with model.hooks(
        fwd_hooks=[
            (
                f"{hook}.hook_sae_acts_post",
                partial(steer, latent=latent, strength=settings.strength),
            )
        ]
    ):
        steered = model(tokens)
        text = model.generate(
            tokens, max_new_tokens=settings.new_tokens, do_sample=False, verbose=False
        )
    print(f"mean change of a logit by steering: {(steered - clean).abs().mean():.2f}")
    print(model.to_string(text[0]))  # type: ignore[index]


if __name__ == "__main__":
    main(parse(Settings))
