# Copyright 2026 The trl_diffusion authors
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""The page in a real browser."""

import shutil
from pathlib import Path

import pytest
from PIL import Image

from trl_diffusion.evaluation import compare, write_report
from trl_diffusion.evaluation.report import Comparison


# Chromium as Debian and others name it.
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="needs Chromium, e.g. apt-get install chromium")
NASTY = "<script>document.title = 'broken'</script><img src=x onerror=\"document.title='broken'\"> & \"quotes\" 'too'"
PROMPTS = ["a fox in the snow", NASTY, "ein Bär", "no score here", "w" * 300]
BASE = {"hpsv2": [0.2, 0.3, 0.1, 0.5, 0.4], "ocr": [1.0, 0.0, 1.0, None, 0.5]}
FIRST = {"hpsv2": [0.3, 0.8, 0.05, 0.5, 0.7], "ocr": [0.0, 0.25, 1.0, None, 0.75]}
SECOND = {"hpsv2": [0.9, 0.3, 0.2, 0.4, 0.4], "ocr": [1.0, 0.0, 0.0, None, 0.5]}


def make_report(folder: Path, adapters=("first", "second"), size=(96, 64)) -> Path:
    models = dict(zip(("base", "first", "second"), (BASE, FIRST, SECOND), strict=True))
    models = {name: scores for name, scores in models.items() if name in ("base", *adapters)}
    colors = {"base": "gray", "first": "teal", "second": "orange"}
    for name in models:
        Image.new("RGB", size, colors[name]).save(folder / f"{name}.png")
    comparisons = [
        Comparison(
            prompt,
            seed,
            {name: folder / f"{name}.png" for name in models},
            {reward: {name: models[name][reward][seed] for name in models} for reward in BASE},
        )
        for seed, prompt in enumerate(PROMPTS)
    ]
    rewards = {
        reward: compare(BASE[reward], {name: models[name][reward] for name in adapters}, PROMPTS) for reward in BASE
    }
    path = folder / "report.html"
    write_report(
        path,
        "black-forest-labs/FLUX.1-dev",
        {name: f"runs/{name}" for name in adapters},
        rewards,
        comparisons,
        {"num_inference_steps": 28},
    )
    return path


def test_page_needs_nothing_else_and_escapes_prompts(tmp_path):
    page = make_report(tmp_path).read_text(encoding="utf-8")
    assert "http://" not in page and "https://" not in page
    assert page.count('src="data:image/webp;base64,') == 15
    assert page.count("<script") == 1
    assert "&lt;script&gt;document.title" in page


def test_large_images_are_made_smaller(tmp_path):
    page = make_report(tmp_path, size=(1280, 640)).read_text(encoding="utf-8")
    assert 'width="640" height="320"' in page
    assert "card pixel" not in page


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("profile"),
            executable_path=BROWSER,
            args=[
                "--no-sandbox",
                "--disable-gpu",
                "--disable-quic",
                "--no-first-run",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
            ],
        )
        yield context
        context.close()


@pytest.fixture
def open_page(browser, tmp_path):
    pages, troubles = [], []

    def open_(width=1280, **report):
        page = browser.new_page()
        page.set_viewport_size({"width": width, "height": 844})
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("console", lambda message: troubles.append(message.text))
        page.on("request", lambda request: request.url.startswith("http") and troubles.append(request.url))
        page.goto(make_report(tmp_path, **report).as_uri())
        pages.append(page)
        return page

    open_.troubles = troubles
    yield open_
    for page in pages:
        page.close()
    assert troubles == []


def shown(page):
    return page.eval_on_selector_all(
        ".card", "cards => cards.filter(card => !card.hidden).map(card => Number(card.dataset.order))"
    )


@needs_browser
def test_sorts_by_the_change_of_each_reward_and_adapter(open_page):
    page = open_page()
    assert shown(page) == [0, 1, 2, 3, 4]
    for label, ascending in {
        "Change of hpsv2, first": [2, 3, 0, 4, 1],  # -0.05, 0, 0.1, 0.3, 0.5
        "Change of hpsv2, second": [3, 1, 4, 2, 0],  # -0.1, 0, 0, 0.1, 0.7
        "Change of ocr, second": [2, 0, 1, 4, 3],  # -1, 0, 0, 0, none
    }.items():
        page.select_option("#sort", label=label)
        descending = shown(page)
        page.click("#direction")
        assert shown(page) == ascending
        page.click("#direction")
        # Equal changes stay in the order of the prompts, and what has no score comes last either way.
        assert descending == shown(page)
        scored = [order for order in descending if label.startswith("Change of hpsv2") or order != 3]
        changes = [
            (FIRST if label.endswith("first") else SECOND)[label.split()[2].rstrip(",")][order]
            - BASE[label.split()[2].rstrip(",")][order]
            for order in scored
        ]
        assert changes == sorted(changes, reverse=True) and (3 in scored or descending[-1] == 3)
    page.select_option("#sort", "")
    assert shown(page) == [0, 1, 2, 3, 4]


@needs_browser
@pytest.mark.parametrize("adapters", [("first",), ("first", "second")])
def test_fits_a_phone(open_page, adapters):
    page = open_page(width=390, adapters=adapters)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    # Images of one prompt stand side by side, and text has a readable size.
    tops = page.eval_on_selector_all(".card:first-child figure", "all => all.map(f => f.getBoundingClientRect().top)")
    assert len(tops) == 1 + len(adapters) and tops[0] == tops[1]
    assert page.evaluate("parseFloat(getComputedStyle(document.querySelector('.prompt')).fontSize)") >= 14


@needs_browser
def test_prompt_with_markup_stays_text(open_page):
    page = open_page()
    assert page.title() == "2 adapters against black-forest-labs/FLUX.1-dev"
    assert page.text_content(".card:nth-child(2) .prompt") == NASTY
    assert page.get_attribute(".card:nth-child(2) img", "alt") == f"base: {NASTY}"
    # Were a prompt to get past the escaping, the page's policy would still not run it.
    page.evaluate(
        "() => { const s = document.createElement('script'); s.textContent = \"document.title = 'broken'\";"
        " document.body.append(s); }"
    )
    assert page.title() != "broken"
    assert "Content Security Policy" in open_page.troubles.pop()


@needs_browser
def test_finds_prompts_and_enlarges_images(open_page):
    page = open_page()
    page.fill("#search", "BÄR")
    assert shown(page) == [2] and page.text_content("#count") == "1 shown"
    page.fill("#search", "")
    page.click(".card:nth-child(3) figure:nth-child(2) button")
    assert page.is_visible("#large") and page.text_content("#what") == "ein Bär"
    assert page.text_content("#tabs [aria-pressed=true]") == "first"
    sources = [page.get_attribute("#large", "src")]
    page.keyboard.press("ArrowRight")
    assert page.text_content("#tabs [aria-pressed=true]") == "second"
    sources.append(page.get_attribute("#large", "src"))
    page.keyboard.press("ArrowRight")
    assert page.text_content("#tabs [aria-pressed=true]") == "base"
    sources.append(page.get_attribute("#large", "src"))
    assert len(set(sources)) == 3
    page.keyboard.press("Escape")
    assert not page.is_visible("#large")


@needs_browser
def test_every_image_is_drawn(open_page):
    page = open_page(adapters=("first",))
    page.evaluate("document.querySelectorAll('img').forEach(image => { image.loading = 'eager'; })")
    widths = page.eval_on_selector_all(
        ".card img", "all => Promise.all(all.map(i => i.decode().then(() => i.naturalWidth)))"
    )
    assert widths == [96] * 10
