"""The explorer page on screens and in browsers of other kinds, and what it counts there."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from analysis.page.reading import dense_activations, read
from playwright.sync_api import Browser, expect

from sae_lens_scale.analysis import explorer


def test_all_bars_of_a_histogram_hold_equally_many_steps(walk: Any, scale_page: str):
    page = walk(scale_page).page
    for steps in (250, 125):
        for most in (0.3, 7.7, 46.57426452636719):
            counts = page.evaluate(
                """([steps, most]) => [...histogram(
                    Array.from({ length: steps }, (_, i) => ((i + 1) / steps) * most), most)]""",
                [steps, most],
            )
            # A step is at the edge of two; nothing is at 0, and the last bar has both.
            assert counts == [steps // 25 - 1] + [steps // 25] * 23 + [steps // 25 + 1]


def test_prompts_do_not_count_and_a_latent_shows_each_once(
    walk: Any, tiny_model: Any, make_sae: Any, make_tokens: Any
):
    sae = make_sae("topk")
    prompts = [f"I love {n} apples, you" for n in range(25)]
    tokens = [make_tokens(rows=3, length=5)]
    text = explorer(tiny_model, sae, tokens, prompts=prompts, verbose=False)
    facts, arrays = read(text)
    acts, first = dense_activations(facts, arrays), arrays["lengths"][:25].sum()
    inside, outside = acts[:first], acts[first:]
    # Of those that fire in both, the one that does so much more in prompts.
    more = inside.max(axis=0) - outside.max(axis=0)
    latent = int(np.where(outside.any(axis=0), more, 0).argmax())
    page = walk(text).page
    main = page.get_by_role("main")
    expect(main.locator(".passage")).to_have_count(20)
    main.get_by_role("button", name="Show 5 more of 5").click()
    expect(main.locator(".passage")).to_have_count(25)
    expect(main.locator(".passage").nth(20).locator("a").first).to_be_focused()
    page.evaluate("view => { location.hash = view; }", f"/{latent}")
    largest = outside[:, latent].max()
    assert largest < 0.9 * inside[:, latent].max()
    shown = re.search(r"at most ([\d.]+)", main.inner_text())
    assert shown is not None
    assert float(shown[1]) == pytest.approx(largest, rel=0.006)
    rows = main.locator("div", has=page.get_by_role("heading", name="Prompts")).last
    parts = np.split(inside[:, latent], arrays["lengths"][:24].cumsum())
    firing = sum(part.any() for part in parts)
    expect(rows.locator(".passage")).to_have_count(min(12, firing))
    texts = rows.locator(".passage .text").all_inner_texts()
    assert len(set(texts)) == len(texts)


def test_an_expert_alone_has_no_cosine_with_others(
    walk: Any, tiny_model: Any, make_sae: Any, make_tokens: Any
):
    sae = make_sae(num_experts=1, experts_per_token=1)
    page = walk(explorer(tiny_model, sae, [make_tokens()], verbose=False)).page
    latents = page.get_by_role("region", name="Latents")
    expect(latents).to_contain_text(re.compile(r"cosine 0\.\d\d within, – with others"))


def test_on_a_narrow_screen_the_page_goes_to_what_was_chosen(
    walk: Any, scale_page: str
):
    page = walk(scale_page, viewport={"width": 600, "height": 300}).page
    experts = page.get_by_role("navigation", name="Experts")
    latents = page.get_by_role("region", name="Latents")
    main = page.get_by_role("main")
    experts.locator("tbody a").nth(1).click()
    expect(latents.get_by_role("heading", level=2)).to_be_in_viewport()
    latents.locator("tbody a").first.click()
    expect(main.get_by_role("heading", level=2)).to_be_in_viewport()
    word = main.locator("a.peak").nth(5)
    word.click()
    token = page.get_by_role("complementary", name="Token")
    expect(token).to_be_in_viewport()
    expect(word).to_be_in_viewport()


def test_a_word_stays_in_sight_above_its_panel(walk: Any, scale_page: str):
    _, arrays = read(scale_page)
    page = walk(scale_page).page
    latent = int(arrays["alive"][arrays["gaps"][0]])
    page.evaluate("view => { location.hash = view; }", f"/{latent}")
    word = page.locator("a.peak").nth(9)
    word.scroll_into_view_if_needed()
    word.click()
    panel = page.get_by_role("complementary", name="Token").bounding_box()
    box = word.bounding_box()
    assert panel is not None
    assert box is not None
    assert box["y"] + box["height"] <= panel["y"]


def test_a_print_has_the_whole_last_column(walk: Any, scale_page: str):
    page = walk(scale_page).page
    page.emulate_media(media="print")
    expect(page.get_by_role("navigation")).to_be_hidden()
    expect(page.get_by_role("region", name="Latents")).to_be_hidden()
    main = page.get_by_role("main")
    assert main.evaluate("main => main.scrollHeight > innerHeight")
    assert main.evaluate("main => main.scrollHeight === main.clientHeight")


def test_a_browser_that_cannot_show_the_page_says_so(
    browser: Browser, scale_page: str, tmp_path: Path
):
    path = tmp_path / "page.html"
    path.write_text(scale_page, encoding="utf-8")
    with browser.new_context(java_script_enabled=False) as context:
        page = context.new_page()
        page.goto(path.as_uri())
        # Playwright's own assertions pass over noscript.
        assert "this page needs JavaScript" in page.get_by_role("main").inner_text()
    with browser.new_context() as context:
        page = context.new_page()
        page.add_init_script("delete window.DecompressionStream")
        page.goto(path.as_uri())
        message = "The page cannot be read: it needs a newer browser"
        expect(page.get_by_role("main")).to_have_text(message)


def test_addresses_of_nothing_lead_to_what_there_is(walk: Any, scale_page: str):
    _, arrays = read(scale_page)
    latent = int(arrays["alive"][0])
    page = walk(scale_page).page
    main = page.get_by_role("main")
    for address, heading in (
        (f"9999/{latent}", f"Latent {latent} "),
        ("x/y", "scale SAE at"),
        ("0/99999999/99999999", "scale SAE at"),
        (f"/{latent}/x", f"Latent {latent} "),
        ("%E0%A4%A", "scale SAE at"),
        ("search=%", "scale SAE at"),
        ("9" * 400, "scale SAE at"),
    ):
        page.evaluate("address => { location.hash = address; }", address)
        expect(main.get_by_role("heading", level=2)).to_contain_text(heading)
