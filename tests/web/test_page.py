"""The page of what was kept, as a person meets it in a browser."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_llava import IMAGE, three, tiny_llava

import vtp_kernels as vtp
from vtp_kernels import plot
from vtp_kernels.models.pictures.grids import PictureGrid, View

MARKUP = "<img src=x onerror='window.ran=1'></script><script>window.ran=1</script>&amp;"
MISSING = next((x for x in ("chromium", "chromedriver") if shutil.which(x) is None), None)
NEEDS_A_BROWSER = pytest.mark.skipif(MISSING is not None, reason=f"no {MISSING} here")


def picture(seed, size=(96, 64)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


PICTURES = {b: [picture(10 * b + i) for i in range(n)] for b, n in enumerate((1, 2, 3))} | {3: []}


@pytest.fixture(scope="module")
def inputs():
    return three()


@pytest.fixture(scope="module")
def reports(inputs):
    """Of prompts with one, two, three and no pictures of 4 x 4 tokens, by two methods; text leaves
    in the second."""
    model, found = tiny_llava(), []
    for method in (
        vtp.PyramidDrop((2, 4), (0.5, 0.25)),
        vtp.InflectionPruning(source=None, llm_layers=(3,), protect_template=False),
    ):
        with vtp.prune(model, method) as run, torch.no_grad():
            model(**inputs)
            found.append(run.report())
    return found


@pytest.fixture(scope="module")
def words(inputs):
    rows = [[f" w{token}" for token in row] for row in inputs["input_ids"].tolist()]
    rows[0][-1] = MARKUP
    return rows


@pytest.fixture(scope="module")
def written(reports, words, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "kept.html"
    names = ["PyramidDrop", MARKUP]
    plot.page(PICTURES, reports, path, prompt=words, names=names, title="Kept & <b>left</b>")
    return path


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    for option in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1600,1000"):
        options.add_argument(option)
    options.binary_location = shutil.which("chromium")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture
def open_page(browser):
    """A function that opens a page; in the end nothing may have gone wrong in it."""

    def opened(path, width=1600):
        browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": False},
        )
        browser.get(path.as_uri())
        browser.implicitly_wait(10)
        browser.find_element("css selector", "body[data-ready]")
        browser.implicitly_wait(0)
        return Page(browser)

    yield opened
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert browser.execute_script("return window.ran") is None


class Page:
    """What a person sees and does."""

    def __init__(self, browser):
        self.browser = browser
        resources = browser.execute_script(
            "return performance.getEntriesByType('resource').map((x) => x.name)"
        )
        assert all(name.startswith("data:") for name in resources)

    def all(self, selector):
        return self.browser.find_elements("css selector", selector)

    def texts(self, selector):
        return [element.text for element in self.all(selector)]

    def set_layer(self, layer):
        self.browser.execute_script(
            "const slider = document.getElementById('layer'); slider.value = arguments[0];"
            "slider.dispatchEvent(new Event('input'))",
            layer,
        )

    def press(self, element, *keys):
        from selenium.webdriver.common.keys import Keys

        for key in keys:
            element.send_keys(getattr(Keys, f"ARROW_{key}"))

    @property
    def said(self):
        return self.all("#said")[0].text

    def bright(self, canvas, i, j):
        """Whether the cell of a 4 x 4 grid is as bright as the picture, on the mean."""
        return self.browser.execute_script(
            "const [c, i, j] = arguments; const w = c.width / 4, h = c.height / 4;"
            "const all = c.getContext('2d').getImageData(j * w, i * h, w, h).data;"
            "return all.filter((x, n) => n % 4 < 3).reduce((a, b) => a + b) / (w * h * 3) > 70",
            *(canvas, i, j),
        )


def columns_of(report, b, number):
    """The input columns of a picture of a prompt."""
    return report.kept.visual[b].nonzero()[16 * number : 16 * number + 16, 0].tolist()


def entering(report, layer):
    """bool [B, S]: the columns whose rows enter a layer."""
    earlier = [before for before in report.kept if before <= layer]
    there = report.kept[max(earlier)] if earlier else torch.ones_like(report.kept.visual)
    return there & report.kept.visual


@NEEDS_A_BROWSER
def test_the_slider_shows_what_enters_each_layer(open_page, written, reports):
    page = open_page(written)
    assert page.texts("h1") == ["Kept & <b>left</b>"]
    canvases = page.all("canvas")
    for layer in (0, 1, 2, 3, 4, 5):
        page.set_layer(layer)
        for report, canvas, told in zip(reports, canvases, page.texts("small"), strict=True):
            columns = columns_of(report, 0, 0)
            there = [bool(entering(report, layer)[0, column]) for column in columns]
            assert told.startswith(f"{sum(there)} of 16 tokens")
            seen = [page.bright(canvas, *divmod(cell, 4)) for cell in range(16)]
            assert seen == there


@NEEDS_A_BROWSER
def test_every_token_tells_its_place_when_it_left_and_its_score(open_page, written, reports):
    page, report = open_page(written), reports[0]
    page.set_layer(5)
    canvas = page.all("canvas")[0]
    columns = columns_of(report, 0, 0)
    page.press(canvas, "DOWN", "RIGHT", "RIGHT")  # from the first one
    for i, j in ((1, 2), (2, 2), (2, 1)):
        column = columns[4 * i + j]
        left = [layer for layer, kept in report.kept.items() if not kept[0, column]]
        words = f"leaves before layer {left[0]}" if left else "stays to the end"
        ranked = max(x for x, of in report.scores.items() if not of[0, column].isnan())
        score = float(report.scores[ranked][0, column])
        assert page.said.startswith(f"PyramidDrop: row {i + 1}, column {j + 1} of")
        assert words in page.said
        told = re.search(rf"score (\S+) before layer {ranked}", page.said)
        assert float(told[1]) == pytest.approx(score, rel=1e-2)
        page.press(canvas, "DOWN" if (i, j) == (1, 2) else "LEFT")
    from selenium.webdriver import ActionChains

    ActionChains(page.browser).move_to_element_with_offset(
        canvas, -canvas.size["width"] // 2 + 3, -canvas.size["height"] // 2 + 3
    ).perform()
    assert "row 1, column 1" in page.said


@NEEDS_A_BROWSER
def test_prompts_and_pictures_have_tabs_that_keys_reach(open_page, written, reports):
    page = open_page(written)
    prompts = page.all("#prompts [role=tab]")
    assert len(prompts) == 4
    for b, count in ((1, 2), (2, 3), (3, 0)):
        chosen = page.all("#prompts [aria-selected=true]")[0]
        page.press(chosen, "RIGHT")
        assert len(page.all("#pictures [role=tab]")) == count
        assert page.browser.switch_to.active_element.get_attribute("aria-selected") == "true"
        page.all("#prompts [aria-selected=true]")[0].click()
        assert page.browser.switch_to.active_element.get_attribute("aria-selected") == "true"
        if count:
            page.press(page.all("#pictures [aria-selected=true]")[0], "LEFT")  # to the last
            page.set_layer(4)
            columns = columns_of(reports[0], b, count - 1)
            there = int(entering(reports[0], 4)[b, columns].sum())
            assert page.texts("small")[0].startswith(f"{there} of 16 tokens")
    assert page.texts("#methods") == ["There is no picture in this prompt."]


@NEEDS_A_BROWSER
def test_words_are_shown_as_they_are_and_struck_where_they_left(
    open_page, written, reports, inputs, words
):
    page = open_page(written)
    assert MARKUP in page.texts("figcaption")[1]
    assert MARKUP in page.texts(".words span")[-1]
    page.set_layer(5)
    lines = page.all(".words")
    assert len(lines) == 2  # text leaves in the second method alone
    gone = [x.text for x in lines[1].find_elements("css selector", ".gone")]
    text = ~reports[1].kept.visual[0] & inputs["attention_mask"][0].bool()
    left = (text & ~reports[1].kept[3][0]).nonzero()[:, 0].tolist()
    assert left and gone == [words[0][column] for column in left]
    assert not lines[0].find_elements("css selector", ".gone")
    page.set_layer(2)
    assert not page.all(".gone")


@NEEDS_A_BROWSER
def test_charts_have_the_numbers_of_the_report(open_page, written, reports):
    page = open_page(written)
    titles = [x.get_attribute("textContent") for x in page.all("svg title")]
    first, last = (reports[0].tokens_per_layer[layer][0] for layer in (0, -1))
    assert len(titles) == 3 and f"PyramidDrop from {first} to {last}" in titles[0]
    assert "no pruning" in page.texts("#legend li")


@NEEDS_A_BROWSER
@pytest.mark.parametrize("width", [400, 1600])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_fits_and_can_be_read(open_page, written, width, scheme):
    page = open_page(written, width)
    page.browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"features": [{"name": "prefers-color-scheme", "value": scheme}]},
    )
    wide = page.browser.execute_script("return document.documentElement.scrollWidth")
    assert wide <= width
    for selector in ("h1", "figcaption small", "#said", ".words span", "[role=tab]"):
        assert contrast(page, page.all(selector)[0]) >= 4.5
    ground = page.browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (luminance(ground) < 0.2) == (scheme == "dark")


def luminance(color):
    channels = [int(x) / 255 for x in re.findall(r"\d+", color)[:3]]
    linear = [x / 12.92 if x <= 0.03928 else ((x + 0.055) / 1.055) ** 2.4 for x in channels]
    return sum(w * x for w, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(page, element):
    """Of text and what is behind it, as WCAG has it."""
    ink, ground = page.browser.execute_script(
        "let e = arguments[0]; const ink = getComputedStyle(e).color;"
        "while (e && /rgba\\(.*, 0\\)/.test(getComputedStyle(e).backgroundColor))"
        "  e = e.parentElement;"
        "return [ink, getComputedStyle(e).backgroundColor]",
        element,
    )
    one, other = sorted((luminance(ink), luminance(ground)))
    return (other + 0.05) / (one + 0.05)


@NEEDS_A_BROWSER
def test_videos_are_shown_frame_by_frame(open_page, reports, tmp_path):
    one = of_prompt(reports[0], 2)
    frames, columns = [picture(i) for i in range(3)], one.kept.visual[0].nonzero()[:, 0]
    grids = [
        PictureGrid(
            0,
            columns[16 * i : 16 * i + 16],
            (View("whole", torch.arange(16).view(4, 4)),),
            video=0,
            frames=range(i, i + 1),
        )
        for i in range(3)
    ]
    plot.page([frames], one, tmp_path / "video.html", grids=grids)
    page = open_page(tmp_path / "video.html")
    page.set_layer(5)
    assert len(page.all("canvas")) == 3
    stayed = entering(one, 5)[0]
    shares = [int(100 * int(stayed[grid.columns].sum()) / 16 + 0.5) for grid in grids]
    assert page.texts(".frames figcaption") == [
        f"frame {i + 1}: {share} %" for i, share in enumerate(shares)
    ]


def of_prompt(report, b):
    """The report of one prompt of several."""
    per_layer = {
        name: [[counts[b]] for counts in getattr(report, name)]
        for name in ("tokens_per_layer", "visual_tokens_per_layer", "kv_tokens_per_layer")
    }
    kept = type(report.kept)(
        {k: v[b : b + 1] for k, v in report.kept.items()}, report.kept.visual[b : b + 1]
    )
    scores = {layer: of[b : b + 1] for layer, of in report.scores.items()}
    dense = [report.dense_tokens[b]]
    return replace(report, dense_tokens=dense, kept=kept, scores=scores, **per_layer)


# ---- without a browser ---------------------------------------------------------------------------


def test_is_one_file_that_loads_nothing(written):
    text = written.read_text()
    assert written.stat().st_size < 2_000_000
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|url\(|@import", text)
    data = re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.S)
    assert json.loads(data[1])["title"] == "Kept & <b>left</b>"


def test_large_pictures_are_made_smaller_until_the_page_fits(reports, tmp_path):
    large = [picture(i, (1600, 1200)) for i in range(3)]
    plot.page(large, of_prompt(reports[0], 2), tmp_path / "large.html")
    assert (tmp_path / "large.html").stat().st_size < 2_000_000


def test_what_does_not_fit_is_refused(reports, words, tmp_path):
    path = tmp_path / "no.html"
    one = of_prompt(reports[0], 0)
    for message, arguments in (
        ("report: expected at least one", ([picture(0)], [])),
        ("report: number 2 is of other inputs", ([picture(0)], [one, of_prompt(reports[0], 1)])),
        ("image: no pictures for prompt 1", ({0: [picture(0)]}, reports)),
        ("picture", ([picture(0), picture(1), picture(2)], one)),
    ):
        with pytest.raises(ValueError, match=message):
            plot.page(*arguments, path)
    with pytest.raises(ValueError, match="names: expected 1"):
        plot.page(picture(0), one, path, names=["a", "b"])
    with pytest.raises(ValueError, match="prompt: expected"):
        plot.page(picture(0), one, path, prompt=words[0][1:])
    assert not path.exists()


def test_scores_that_are_not_finite_are_written(reports, tmp_path):
    one = of_prompt(reports[0], 0)
    columns = columns_of(one, 0, 0)
    one.scores[2] = one.scores[2].clone()
    one.scores[2][0, columns[0]], one.scores[2][0, columns[1]] = -torch.inf, torch.inf
    plot.page(PICTURES[0], one, tmp_path / "odd.html")
    data = re.search(r'type="application/json">(.*?)</script>', (tmp_path / "odd.html").read_text())
    scores = json.loads(data[1])["methods"][0]["prompts"][0]["scores"]["2"]
    assert [scores[column] for column in columns[:2]] == ["-Infinity", "Infinity"]
    assert scores[0] is None


def test_methods_have_names_in_words(reports, tmp_path):
    plot.page(PICTURES, reports, tmp_path / "named.html")
    text = (tmp_path / "named.html").read_text()
    assert '"name":"PyramidDrop' in text and f'"{IMAGE}' not in text
