"""Language models that explain latents and judge passages. Needs the extra ``autointerp``."""

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, pipeline

from sae_lens_scale.extras import require

# From chat messages, each with a "role" and a "content", to the reply.
Judge = Callable[[list[dict[str, str]]], str]


def openai_judge(
    model: str,
    base_url: str | None = None,
    api_key: str | None = None,
    **request: Any,
) -> Judge:
    """
    Make a judge of a model behind an endpoint with OpenAI's chat completions protocol.

    Args:
        model: The model's name there.
        base_url: The endpoint, such as ``http://localhost:8000/v1``; by default
            ``OPENAI_BASE_URL`` or OpenAI's own.
        api_key: Its key; by default ``OPENAI_API_KEY``. Endpoints without keys take any.
        **request: Further parameters of each request, such as ``max_tokens``. The
            temperature is 0 unless given; ``temperature=None`` leaves it out.

    Returns:
        The judge. It can be called from several threads at a time, repeats requests that
        fail for reasons that may pass, and raises the ``openai`` package's exceptions.

    Raises:
        ImportError: If the package ``openai`` is not installed.
        openai.OpenAIError: If there is no key.
    """
    # Here and not above: other judges do without the extra that brings it.
    require("openai", "autointerp")
    from openai import OpenAI

    client = OpenAI(base_url=base_url, api_key=api_key, max_retries=5)
    parameters = {"temperature": 0.0, **request}
    if parameters["temperature"] is None:
        del parameters["temperature"]

    def judge(messages: list[dict[str, str]]) -> str:
        chat: Any = messages
        completion = client.chat.completions.create(
            model=model, messages=chat, **parameters
        )
        return completion.choices[0].message.content or ""

    return judge


def local_judge(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int = 500,
) -> Judge:
    """
    Make a judge of a Hugging Face model on this machine, decoding greedily.

    Args:
        model: An instruction-tuned language model.
        tokenizer: Its tokenizer, with a chat template.
        max_new_tokens: Length of a reply in tokens at most.

    Returns:
        The judge. One call at a time.

    Raises:
        ValueError: If the tokenizer has no chat template.
    """
    if tokenizer.chat_template is None:
        raise ValueError("tokenizer must have a chat template, got none")
    # Its overloads differ from one version of transformers to the next.
    make: Any = pipeline
    generate = make("text-generation", model=model, tokenizer=tokenizer)

    def judge(messages: list[dict[str, str]]) -> str:
        (reply,) = generate(
            messages,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            return_full_text=False,
        )
        return reply["generated_text"]

    return judge
