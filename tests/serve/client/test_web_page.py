"""The page in a real browser, before the side-car, before the real server."""

import base64
import importlib.util
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tests.required import skip_or_fail
from tests.serve.client.conftest import RAISING_SEED, RunningPage
from tests.serve.conftest import load_sample
from treeq_export.client.connection import Connection
from treeq_export.client.inputs import make_inputs
from treeq_export.client.sampler import read_info

pytestmark = pytest.mark.triton
OpenPage = Callable[..., RunningPage]


@pytest.fixture(scope="session")
def screenshot() -> ModuleType:
    """The sample that takes pictures of the page."""
    if importlib.util.find_spec("playwright") is None:
        skip_or_fail("chromium", "playwright is not installed")
    return load_sample("screenshot")


@pytest.fixture(scope="module")
def browser(screenshot: ModuleType) -> Iterator[Any]:
    """A headless Chromium."""
    if screenshot.find_chromium() is None:
        skip_or_fail("chromium", f"none of {', '.join(screenshot.CHROMIUMS)} is installed")
    with screenshot.open_browser() as browser:
        yield browser


class Tab:
    """A tab that keeps what went wrong in it, and whom it asked.

    Args:
        browser: Where it is opened.
        options: Of the browser's context.
    """

    def __init__(self, browser: Any, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.errors: list[str] = []
        self.hosts: set[str] = set()
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on(
            "console",
            lambda message: self.errors.append(message.text) if message.type == "error" else None,
        )
        self.page.on("request", lambda request: self.hosts.add(urlsplit(request.url).netloc))

    def pixels(self) -> NDArray[np.uint8]:
        """Return the shown image as the browser has decoded it."""
        source = self.page.locator("#image").get_attribute("src")
        with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as picture:
            return np.asarray(picture)


@pytest.fixture
def open_tab(browser: Any) -> Iterator[Callable[..., Tab]]:
    """A function: options of the browser's context -> an empty tab."""
    tabs: list[Tab] = []

    def open_tab(**options: Any) -> Tab:
        tabs.append(Tab(browser, **options))
        return tabs[-1]

    yield open_tab
    for tab in tabs:
        tab.context.close()


def wanted_image(connection: Connection, label: int, seed: int) -> NDArray[np.uint8]:
    inputs = make_inputs(read_info(connection), label=label, seed=seed)
    return connection.infer("sampler", inputs, ["image"])["image"][0, :, :, 0]


@pytest.mark.parametrize("server", ["http", "grpc"])
def test_a_label_becomes_an_image(
    open_page: OpenPage,
    open_tab: Callable[..., Tab],
    screenshot: ModuleType,
    connect: Callable[..., Connection],
    server: str,
):
    served, tab = open_page(server), open_tab()
    page = tab.page
    page.goto(served.url)
    page.locator("#facts span").first.wait_for()
    assert page.title() == "digits \u2013 treeq-export"
    assert page.locator("input[name=class]").count() == 10
    assert page.locator("#numbers").is_hidden()
    assert page.locator("#steps").get_attribute("placeholder") == "20"
    page.get_by_role("radio", name="7").check()
    page.get_by_label("Seed", exact=True).fill("1")
    page.get_by_label("Steps").fill("5")
    page.get_by_role("button", name="Generate").click()
    image = page.get_by_role("img", name="Generated image: label 7, seed 1")
    image.wait_for()
    assert image.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [8, 8]
    assert image.evaluate("image => getComputedStyle(image).imageRendering") == "pixelated"
    assert image.bounding_box()["width"] > 250
    np.testing.assert_array_equal(tab.pixels(), wanted_image(connect("http"), 7, 1))
    assert float(page.locator("#latency").inner_text().split()[0]) > 0
    assert float(page.locator("#round-trip").inner_text().split()[0]) > 0
    assert page.locator("#solver").inner_text() == "5 steps, guidance 1.5"
    assert page.url.endswith("/?seed=1&steps=5&label=7")

    screenshot.generate(page, 3, 2)
    tags = page.locator("#strip li .tag:nth-of-type(1)").all_inner_texts()
    assert tags == ["3, seed 2", "7, seed 1"]
    page.get_by_role("button", name="Show label 7, seed 1").click()
    np.testing.assert_array_equal(tab.pixels(), wanted_image(connect("http"), 7, 1))
    assert page.get_by_role("radio", name="7").is_checked()
    assert page.locator("#seed").input_value() == "1"
    before = page.locator("#seed").input_value()
    page.get_by_role("button", name="Random seed").click()
    assert page.locator("#seed").input_value() != before
    assert tab.errors == []
    assert tab.hosts <= {urlsplit(served.url).netloc, ""}


def test_a_link_generates_once(open_page: OpenPage, open_tab: Callable[..., Tab], connect: Any):
    tab = open_tab()
    tab.page.goto(f"{open_page().url}?label=4&seed=9")
    tab.page.get_by_role("img", name="Generated image: label 4, seed 9").wait_for()
    np.testing.assert_array_equal(tab.pixels(), wanted_image(connect("http"), 4, 9))
    assert tab.page.locator("#strip li").count() == 1
    assert tab.errors == []


def test_errors_are_a_line_on_the_page(open_page: OpenPage, open_tab: Callable[..., Tab]):
    served, tab = open_page(), open_tab()
    page = tab.page
    page.goto(served.url)
    page.locator("#facts span").first.wait_for()
    for field, value, line in (
        ("seed", str(RAISING_SEED), "message: ValueError: raised on purpose."),
        ("seed", "-1", "seed: received -1, expected 0 or more."),
        ("guidance", "0.5", "the server's default is 1.5."),
        ("steps", "1.5", "steps: Input should be a valid integer."),
    ):
        page.locator(f"#{field}").fill(value)
        page.locator("#go").click()
        page.locator("#go:enabled").wait_for()
        shown = page.get_by_role("alert").inner_text()
        assert shown.endswith(line)
        assert "\n" not in shown
        page.locator(f"#{field}").fill("")
    page.locator("#go").click()
    page.locator("#image").wait_for()
    assert page.get_by_role("alert").count() == 0  # gone with the next image
    served.close()
    page.locator("#go").click()
    page.locator("#go:enabled").wait_for()
    assert "the side-car does not answer" in page.get_by_role("alert").inner_text()
    # A status of 4xx or 5xx is a line in the console by the browser itself; nothing else is.
    assert all(line.startswith("Failed to load resource") for line in tab.errors)


def test_a_server_that_is_down_comes_back(open_page: OpenPage, open_tab: Callable[..., Tab]):
    tab = open_tab()
    tab.page.goto(open_page("http://127.0.0.1:1").url)
    tab.page.get_by_role("alert").wait_for()
    assert "not reached (Connection refused)" in tab.page.get_by_role("alert").inner_text()
    tab.page.locator("#go").click()  # asks again
    tab.page.locator("#go:enabled").wait_for()
    assert "not reached" in tab.page.get_by_role("alert").inner_text()


def test_many_classes_and_texts(open_page: OpenPage, open_tab: Callable[..., Tab]):
    page = open_tab().page
    page.goto(open_page("http", "large").url)
    field = page.get_by_label("Label 0\u2013999")
    field.fill("207")
    page.locator("#go").click()
    page.get_by_role("img", name="Generated image: label 207, seed 0").wait_for()
    page.goto(open_page("http", "text").url)
    page.get_by_role("alert").wait_for()
    assert page.get_by_role("alert").inner_text() == (
        "digits is a text model. Start treeq-export web with --conditioning FILE."
    )


def test_screenshots(open_page: OpenPage, browser: Any, screenshot: ModuleType, tmp_path: Path):
    url = open_page().url
    brightness = []
    for dark in (False, True):
        path = tmp_path / f"{dark}.png"
        screenshot.take_screenshot(browser, url, path, labels=[7], size=(640, 480), dark=dark)
        with Image.open(path) as picture:
            assert picture.width == 2 * 640
            brightness.append(np.asarray(picture.convert("L"))[0, 0])
    assert brightness[0] > 200
    assert brightness[1] < 50


def test_the_page_is_not_wider_than_a_phone(open_page: OpenPage, open_tab: Callable[..., Tab]):
    page = open_tab(viewport={"width": 360, "height": 740}).page
    page.goto(f"{open_page().url}?label=7&seed=1")
    page.locator("#image").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
