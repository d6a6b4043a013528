"""A report as a reader has it: opened from a file in Chromium, headless."""

import shutil

import pytest

from reports import everything

webdriver = pytest.importorskip("selenium.webdriver", reason="the session `browser` installs it")

WIDTHS = (400, 1400)
QUIET = """
--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync
"""
# What is wider than the window, and does not scroll by itself.
TOO_WIDE = """
const inside = (element) => element.parentElement?.closest(".scroll, .sr, .skip, svg");
return [...document.body.querySelectorAll("*")]
    .filter((x) => !inside(x) && !x.matches(".skip, .sr"))
    .filter((x) => x.getBoundingClientRect().right > innerWidth + 1)
    .map((x) => x.outerHTML.slice(0, 80));
"""
# Least contrast of text with the page, by WCAG's formula, and where it is.
CONTRAST = """
const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
const rgb = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
};
const luminance = (colour) => rgb(colour)
    .map((x) => x / 255)
    .map((x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4))
    .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
const page = luminance(getComputedStyle(document.body).backgroundColor);
let least = [21, ""];
const shown = "h1, h2, h3, h4, p, a, th, td:not(.none), dd, dt, li, small, figcaption, .chip";
for (const x of document.querySelectorAll(shown)) {
    const text = luminance(getComputedStyle(x).color);
    const ratio = (Math.max(text, page) + 0.05) / (Math.min(text, page) + 0.05);
    if (x.textContent.trim() && ratio < least[0]) least = [ratio, x.outerHTML.slice(0, 80)];
}
return least;
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    file = tmp_path_factory.mktemp("report") / "crosscheck.html"
    file.write_text(everything().as_html(), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in (*QUIET.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    with webdriver.Chrome(options, service) as driver:
        yield driver


@pytest.fixture
def page(browser, path):
    browser.get_log("browser"), browser.get_log("performance")  # of the test before
    browser.get(path.as_uri())
    return browser


def look(page, width, scheme="light"):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})


def test_it_is_shown_without_a_complaint_and_loads_nothing(page, path):
    assert page.get_log("browser") == []
    sent = [x["message"] for x in page.get_log("performance")]
    requests = [x for x in sent if '"Network.requestWillBeSent"' in x]
    asked = {x.partition('"url":"')[2].partition('"')[0] for x in requests}
    assert {x for x in asked if not x.startswith("data:")} == {path.as_uri()}


def test_no_name_and_no_message_is_obeyed(page):
    assert page.title.startswith("heedful crosscheck: ")
    assert page.execute_script("return document.scripts.length + document.images.length") == 0
    assert "<script>" in page.find_element("tag name", "main").text


def test_every_link_leads_to_what_it_names(page):
    links = page.find_elements("css selector", "a[href]")
    assert len(links) > 10
    for link in links:
        target = link.get_dom_attribute("href").removeprefix("#")
        page.execute_script("arguments[0].click()", link)
        assert page.execute_script("return document.querySelector(':target').id") == target


def test_the_keyboard_reaches_every_section(page):
    keys = webdriver.Keys
    body = page.find_element("tag name", "body")
    body.send_keys(keys.TAB)
    reached = set()
    for _ in range(200):
        at = page.switch_to.active_element
        if at.tag_name == "body":
            break
        reached.add(at.get_dom_attribute("href"))
        section = page.execute_script(
            "return arguments[0].closest('section')?.id", page.switch_to.active_element
        )
        reached.add(f"#{section}")
        at.send_keys(keys.TAB)
    sections = [x.get_dom_attribute("id") for x in page.find_elements("css selector", "section")]
    assert len(sections) > 6
    assert {f"#{section}" for section in sections} <= reached


def test_what_has_the_focus_is_seen_to_have_it(page):
    page.find_element("tag name", "body").send_keys(webdriver.Keys.TAB)
    at = page.switch_to.active_element
    assert at.value_of_css_property("outline-style") == "solid"
    assert at.rect["x"] >= 0  # the link that skips is shown


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_it_is_readable(page, width, scheme):
    look(page, width, scheme)
    assert page.execute_script("return document.documentElement.scrollWidth") <= width
    assert page.execute_script(TOO_WIDE) == []
    ratio, where = page.execute_script(CONTRAST)
    assert ratio >= 4.5, where  # WCAG's AA
    least = page.execute_script(
        "return Math.min(...[...document.querySelectorAll('p, td, th, dd, li, figcaption')]"
        ".map((x) => parseFloat(getComputedStyle(x).fontSize)))"
    )
    assert least >= 12


def test_a_wide_table_scrolls_by_itself(page):
    look(page, 400)
    wide = page.execute_script(
        "return [...document.querySelectorAll('.scroll')].filter((x) => x.scrollWidth > x.clientWidth)"
        ".map((x) => x.tabIndex)"
    )
    assert wide and set(wide) == {0}
