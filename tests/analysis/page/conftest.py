"""A real browser, and a page of an SAE to open in it."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from playwright.sync_api import Browser, Page, sync_playwright

from sae_lens_scale.analysis import explorer


class Walk(NamedTuple):
    """A page in the browser, with all that it asked for or complained of."""

    page: Page
    requests: list[str]
    complaints: list[str]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Headless Chromium; only CI has to have it."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        assert not os.environ.get("CI"), "CI needs Chromium"
        pytest.skip("Chromium is not installed")
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=chromium, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def walk(browser: Browser, tmp_path: Path) -> Iterator[Any]:
    """Function that opens a page's HTML; nothing may come from a network, or go wrong."""
    opened: list[Walk] = []

    def open_page(text: str, **settings: Any) -> Walk:
        path = tmp_path / "page.html"
        path.write_text(text, encoding="utf-8")
        settings = {"viewport": {"width": 1440, "height": 900}, **settings}
        page = browser.new_page(**settings)
        one = Walk(page, [], [])
        page.on("request", lambda request: one.requests.append(request.url))
        page.on("console", lambda message: one.complaints.append(message.text))
        page.on("pageerror", lambda error: one.complaints.append(str(error)))
        page.goto(path.as_uri())
        page.wait_for_selector("main[aria-busy=false]")
        opened.append(one)
        return one

    yield open_page
    for one in opened:
        assert one.requests == [(tmp_path / "page.html").as_uri()]
        assert not one.complaints
        one.page.context.close()


@pytest.fixture(scope="module")
def scale_page(tiny_model: Any, make_sae: Any) -> str:
    """Page of a Scale SAE on 40 passages, beside a prompt."""
    generator = torch.Generator().manual_seed(3)
    # Few different tokens, so that latents fire on each more than once.
    tokens = torch.randint(500, 560, (40, 16), generator=generator)
    tokens[:, 0] = 1
    sae = make_sae("scale", num_shared_experts=1, experts_per_token=3)
    sae.cfg.metadata.omega = [0.0, 0.5, -0.25, 1.0]
    prompts = ["I love apples"]
    return explorer(tiny_model, sae, [tokens], prompts=prompts, verbose=False)
