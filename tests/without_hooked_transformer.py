"""
Training, loading and analysis where there is no HookedTransformer, in a process of its own.

Usage: without_hooked_transformer.py MODEL TEXT OUTPUT NAME...

The names, of classes and modules, are hidden once SAELens has imported what it needs of
them, for it cannot yet do without. The last line of output is SmolLM2's loss on
``SENTENCE``, in nats per token.
"""

import importlib
import pkgutil
import sys

import sae_lens
import torch
from datasets import load_dataset
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

SENTENCE = "Explained by a spliced SAE, of which there is one."

llama, text, output, *hidden = sys.argv[1:]
for name in hidden:
    package, _, attribute = name.rpartition(".")
    vars(sys.modules[package]).pop(attribute, None)
    for module in list(sys.modules):
        if f"{module}.".startswith(f"{name}."):
            sys.modules[module] = None  # type: ignore[assignment]
    sys.modules.setdefault(name, None)  # type: ignore[arg-type]

import sae_lens_scale
from sae_lens_scale.analysis import explain_tokens, loss_recovered
from sae_lens_scale.loading.language_model import load_language_model
from sae_lens_scale.loading.smollm2 import load_smollm2
from sae_lens_scale.runner import InterruptibleTrainingRunner
from sae_lens_scale.upstream import HAS_HOOKED_TRANSFORMER, buffer_argument

assert not HAS_HOOKED_TRANSFORMER
for module in pkgutil.walk_packages(sae_lens_scale.__path__, "sae_lens_scale."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)

model = load_language_model(llama, "cpu")
assert type(model) is SAETransformerBridge
hook = "blocks.0.hook_resid_post"
corpus = load_dataset(text, split="train")
cfg = sae_lens.LanguageModelSAERunnerConfig(
    sae=sae_lens_scale.ScaleTrainingSAEConfig(d_in=32, d_sae=64, num_experts=4, k=4),
    hook_name=hook,
    is_dataset_tokenized=False,
    context_size=16,
    training_tokens=1_024,
    train_batch_size_tokens=128,
    store_batch_size_prompts=8,
    **buffer_argument(16),
    logger=sae_lens.LoggingConfig(log_to_wandb=False),
    checkpoint_path=None,
    output_path=output,
)
trained = InterruptibleTrainingRunner(
    cfg, override_model=model, override_dataset=corpus
).run()

sae = sae_lens.SAE.load_from_disk(output)
assert type(sae) is sae_lens_scale.ScaleSAE
x = torch.randn(8, 32)
torch.testing.assert_close(sae.encode(x), trained.encode(x))
explained = explain_tokens(model, sae, SENTENCE)
assert all(len(token.experts) == 2 and token.latents for token in explained)
losses = loss_recovered(model, sae, [model.to_tokens(SENTENCE)])
# Each took effect at its hook.
assert len({losses.with_sae, losses.without_sae, losses.with_ablation}) == 3

smollm2 = load_smollm2()
assert type(smollm2) is SAETransformerBridge
sys.stdout.write(f"{smollm2(SENTENCE, return_type='loss').item()}\n")
