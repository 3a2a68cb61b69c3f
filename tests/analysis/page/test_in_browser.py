"""The explorer page in a real browser: walked, searched, read by a screen reader."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from analysis.page.reading import dense_activations, read, rebuilt
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, expect

from sae_lens_scale.analysis import explorer

# As what a token's text may be, to a page.
HOSTILE = [
    "</script><script>window.attacked = 1</script>",
    "<img src=x onerror='window.attacked = 1'>",
    "/*data*/ /*script*/ <!-- ",
    "\u202etfel-ot-thgir\u0000\x1b\u2028",
    "\N{FAMILY}\N{ZERO WIDTH JOINER}&amp;&#0;",
    "مرحبا",
    "x" * 400,
]


def test_one_walks_from_experts_to_latents_to_contexts_to_tokens(
    walk: Any, scale_page: str
):
    facts, arrays = read(scale_page)
    acts = dense_activations(facts, arrays)[arrays["lengths"][0] :]
    page = walk(scale_page).page
    experts = page.get_by_role("navigation", name="Experts")
    expect(experts.locator("tbody tr")).to_have_count(4)
    expect(page.locator("#summary")).to_contain_text(
        "4 experts of 16 latents, 600 tokens"
    )
    experts.get_by_role("link", name="2", exact=True).click()

    latents = page.get_by_role("region", name="Latents")
    expect(latents.get_by_role("heading", name="Expert 2")).to_be_visible()
    densities = (acts[:, 32:48] != 0).sum(axis=0)
    rows = latents.locator("tbody tr")
    expect(rows).to_have_count(int((densities > 0).sum()))
    busiest = 32 + int(densities.argmax())
    first = rows.first
    expect(first.locator("td").nth(1)).to_have_text(f"{densities.max() / 6:.1f}%")
    first.get_by_role("link").click()

    main = page.get_by_role("main")
    expect(main.get_by_role("heading", level=2)).to_contain_text(f"Latent {busiest}")
    assert page.url.endswith(f"#2/{busiest}")
    strongest = main.locator(
        "div", has=page.get_by_role("heading", name="Strongest")
    ).last
    shown = strongest.locator(".passage .number").all_inner_texts()
    per_passage = acts[:, busiest].reshape(40, 16).max(axis=1)
    expected = sorted(per_passage[per_passage > 0], reverse=True)[:12]
    assert [float(text) for text in shown] == pytest.approx(expected, rel=0.006)

    passage = strongest.locator(".passage").first
    passage.locator("a.peak").click()
    token = page.get_by_role("complementary", name="Token")
    index = int(page.url.rpartition("/")[2])
    expect(token.locator("tbody tr")).to_have_count(int(arrays["counts"][index]))
    e = 3
    chosen = arrays["experts"][index * e : (index + 1) * e]
    headings = token.get_by_role("heading", level=3).all_inner_texts()
    assert [int(text.split()[0]) for text in headings] == chosen.tolist()
    page.keyboard.press("Escape")
    expect(token).to_have_count(0)
    assert page.url.endswith(f"#2/{busiest}")
    page.go_back()
    expect(token).to_be_visible()


def test_tokens_of_a_context_are_reached_with_the_keyboard(walk: Any, scale_page: str):
    page = walk(scale_page).page
    words = page.locator(".passage").first.locator("a")
    words.first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    expect(words.nth(1)).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_role("complementary", name="Token")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.get_by_role("main")).to_be_focused()
    page.get_by_role("navigation", name="Experts").locator("tbody a").first.focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("region", name="Latents")).to_be_focused()
    page.get_by_role("region", name="Latents").locator("tbody a").first.focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("main")).to_be_focused()
    page.go_back()
    page.go_back()
    page.go_back()
    token = page.get_by_role("complementary", name="Token")
    expect(token).to_be_focused()
    expect(token.get_by_role("heading", level=2)).to_have_text("Token I")
    expect(token).to_contain_text("prompt 0, position 1, 6 latents fire")


def test_latents_are_found_by_token_number_and_explanation(walk: Any, scale_page: str):
    facts, arrays = read(scale_page)
    latent, other = (int(i) for i in arrays["alive"][[3, 5]])
    newline = arrays["tokens"][-1]
    facts["strings"][newline] = "\n"
    facts["explanations"] = {
        str(other): {"text": "Fruit & veg", "detection": 0.75, "fuzzing": None}
    }
    page = walk(rebuilt(scale_page, facts)).page
    search = page.get_by_role("searchbox", name="Find latents")
    status = page.get_by_role("status")
    links = page.get_by_role("region", name="Latents").locator("tbody a")

    token = next(
        t
        for t in facts["strings"]
        if re.fullmatch(r" [a-z]{4,}", t)
        and facts["strings"].index(t) in arrays["tokens"]
    )
    search.fill(token.strip().upper())
    search.press("Enter")
    acts = dense_activations(facts, arrays)
    ids = [
        i for i, t in enumerate(facts["strings"]) if t.strip().lower() == token.strip()
    ]
    sums = acts[[i in ids for i in arrays["tokens"]]].sum(axis=0)
    expect(status).to_contain_text(f"{(sums > 0).sum()} latents for")
    # Those that fire on much else come later.
    alive = acts.any(axis=0)
    ranks = np.where(alive, sums**2 / np.where(alive, acts.sum(axis=0), 1), 0)
    expect(links.first).to_have_text(str(ranks.argmax()))

    search.fill(str(latent))
    search.press("Enter")
    expect(links.first).to_have_text(str(latent))
    search.fill("fruit &")
    search.press("Enter")
    expect(links).to_have_text([str(other)])
    links.first.click()
    expect(page.get_by_role("main")).to_contain_text("Fruit & veg detection 0.75")
    # As tokens are shown.
    search.fill("\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}")
    search.press("Enter")
    fires = (acts[arrays["tokens"] == newline] != 0).any(axis=0)
    expect(links).to_have_count(int(fires.sum()))
    page.go_back()
    page.go_back()
    expect(search).to_have_value("fruit &")
    search.fill("no such thing")
    search.press("Enter")
    expect(status).to_have_text("0 latents for “no such thing”")


def test_lists_are_sorted_and_filtered(walk: Any, scale_page: str):
    facts, arrays = read(scale_page)
    page = walk(scale_page).page
    experts = page.get_by_role("navigation", name="Experts")
    experts.get_by_label("sort by").focus()
    experts.get_by_label("sort by").select_option("omega")
    expect(experts.locator("tbody a")).to_have_text(["3", "1", "0", "2"])
    expect(experts.get_by_label("sort by")).to_be_focused()
    experts.get_by_role("link", name="1", exact=True).click()
    latents = page.get_by_role("region", name="Latents")
    latents.get_by_label("sort by").select_option("maximum")
    own = (arrays["alive"] >= 16) & (arrays["alive"] < 32)
    order = arrays["largest"][own].argsort(kind="stable")[::-1]
    expect(latents.locator("tbody a")).to_have_text(
        [str(i) for i in arrays["alive"][own][order]]
    )
    chip = latents.locator("tbody .chip").first.inner_text().strip()
    text_filter = latents.get_by_label("Filter by token or explanation")
    text_filter.press_sequentially(chip)
    expect(text_filter).to_be_focused()
    expect(latents).not_to_contain_text(f"{own.sum()} of {own.sum()} latents")
    assert 0 < latents.locator("tbody tr").count() < own.sum()
    for row in latents.locator("tbody tr").all():
        expect(row).to_contain_text(chip, ignore_case=True)
    text_filter.press("Tab")
    expect(latents.locator("tbody a").first).to_be_focused()
    # The next expert's latents have the same order, all of them.
    experts.get_by_role("link", name="2", exact=True).click()
    expect(latents.get_by_label("sort by")).to_have_value("maximum")
    expect(text_filter).to_have_value("")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_screen_reader_can_read_every_view(walk: Any, scale_page: str, scheme: str):
    _, arrays = read(scale_page)
    latent = int(arrays["alive"][8])
    page = walk(scale_page, color_scheme=scheme, bypass_csp=True).page
    for view in (
        "",
        f"{latent // 16}/{latent}",
        f"{latent // 16}/{latent}/2",
        "search=a",
    ):
        page.evaluate("view => { location.hash = view; }", view)
        page.wait_for_timeout(50)
        found = Axe().run(page).response["violations"]
        assert not found, [(v["id"], v["nodes"][0]["html"]) for v in found]


@pytest.mark.parametrize("text", HOSTILE)
def test_text_is_shown_and_does_nothing(walk: Any, scale_page: str, text: str):
    facts, arrays = read(scale_page)
    token = int(arrays["lengths"][0]) + 1
    facts["strings"][int(arrays["tokens"][token])] = text
    facts["model_name"] = facts["hook_name"] = text
    facts["explanations"] = {
        str(i): {"text": text, "detection": None, "fuzzing": None}
        for i in arrays["alive"].tolist()
    }
    page = walk(rebuilt(scale_page, facts)).page
    latent = int(arrays["alive"][arrays["gaps"][arrays["counts"][:token].sum()]])
    page.evaluate("view => { location.hash = view; }", f"/{latent}/{token}")
    chip = page.get_by_role("complementary", name="Token").locator("h2 .chip")
    expect(chip).to_be_visible()
    shown = chip.inner_text()
    for character in text:
        assert character in shown or not character.isprintable()
    assert page.evaluate(
        """[...document.querySelectorAll("nav, section, main, aside")]
            .every((part) => part.scrollWidth <= part.clientWidth)"""
    )
    page.evaluate("view => { location.hash = view; }", f"search={text}")
    assert page.evaluate("window.attacked") is None


def test_maps_of_pairs_of_experts_are_read_and_opened(walk: Any, scale_page: str):
    facts, arrays = read(scale_page)
    first = int(arrays["lengths"][0])
    chosen = arrays["experts"].reshape(-1, 3)[first:]
    excluded = np.isin(arrays["tokens"][first:], facts["excluded"])
    pairs = np.zeros((4, 4), dtype=int)
    for experts in chosen[~excluded]:
        pairs[np.ix_(experts, experts)] += 1
    page = walk(scale_page).page
    canvas = page.get_by_role("img", name="Co-selection of experts")
    box = canvas.bounding_box()
    assert box is not None
    # Expert 0 is shared by all tokens: the map is of the others, in an order of its own.
    seen = set()
    for row in range(3):
        for column in range(3):
            x, y = ((place + 0.5) / 3 for place in (column, row))
            canvas.hover(position={"x": x * box["width"], "y": y * box["height"]})
            line = page.locator("p", has_text="times as often").inner_text()
            found = re.match(r"experts (\d) and (\d): together on ([\d.]+)%", line)
            assert found is not None
            a, b = int(found[1]), int(found[2])
            assert float(found[3]) == pytest.approx(pairs[a, b] / 6, abs=0.051)
            seen.add((a, b))
    assert seen == {(a, b) for a in (1, 2, 3) for b in (1, 2, 3)}
    canvas.click(position={"x": 2, "y": 2})
    expect(page).to_have_url(re.compile(r"#[123]$"))


def test_near_misses_have_the_expert_and_a_token_that_fires_the_latent_elsewhere(
    walk: Any, scale_page: str
):
    facts, arrays = read(scale_page)
    acts = dense_activations(facts, arrays)
    first = int(arrays["lengths"][0])
    ids, experts = arrays["tokens"], arrays["experts"].reshape(-1, 3)
    # Of each latent, the passages with such a token.
    misses = {
        latent: {
            (t - first) // 16
            for t in range(first, len(ids))
            if ids[t] in ids[first:][acts[first:, latent] != 0]
            and acts[t, latent] == 0
            and latent // 16 in experts[t]
        }
        for latent in arrays["alive"].tolist()
    }
    page = walk(scale_page).page
    main = page.get_by_role("main")
    by_count = sorted(misses, key=lambda latent: len(misses[latent]))
    for latent in (by_count[0], by_count[-1]):
        page.evaluate("view => { location.hash = view; }", f"/{latent}")
        expect(main.get_by_role("heading", level=2)).to_contain_text(f"Latent {latent}")
        listed = main.locator(
            "div", has=page.get_by_role("heading", name="Near misses")
        )
        peaks = listed.last.locator("a.peak") if misses[latent] else listed
        expect(peaks).to_have_count(min(6, len(misses[latent])))
        for peak in peaks.all():
            token = int((peak.get_attribute("href") or "").rpartition("/")[2])
            assert (token - first) // 16 in misses[latent]
            assert acts[token, latent] == 0


def test_a_dense_sae_has_latents_without_experts(
    walk: Any, tiny_model: Any, make_sae: Any, make_tokens: Any
):
    text = explorer(tiny_model, make_sae("abstopk"), [make_tokens()], verbose=False)
    facts, arrays = read(text)
    page = walk(text).page
    expect(page.locator("#experts")).to_be_hidden()
    acts = dense_activations(facts, arrays)
    negative = int((acts < 0).sum(axis=0).argmax())
    page.evaluate("view => { location.hash = view; }", f"0/{negative}")
    main = page.get_by_role("main")
    expect(main.get_by_role("heading", level=2)).to_have_text(f"Latent {negative}")
    lowest = acts[:, negative].min()
    expect(main.locator(".passage .number", has_text="-").first).to_be_visible()
    shown = [float(n) for n in main.locator(".passage .number").all_inner_texts()]
    assert min(shown) == pytest.approx(lowest, rel=0.01)


def test_a_page_that_is_cut_off_says_so(
    browser: Browser, scale_page: str, tmp_path: Path
):
    path = tmp_path / "broken.html"
    path.write_text(scale_page.replace('"data": "', '"data": "AAAA', 1))
    page = browser.new_page()
    page.goto(path.as_uri())
    expect(page.get_by_role("main")).to_contain_text("The page cannot be read")
    page.close()
