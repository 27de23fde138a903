"""A picture of the page that `treeq-export web` serves, with images generated on it.

    treeq-export web --url http://localhost:8000 --port 8080 &
    python samples/local_triton/screenshot.py http://127.0.0.1:8080/ page.png

Needs playwright and a Chromium of the system; the pictures on the page are real answers of the
server behind it.
"""

import argparse
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Error, Page, sync_playwright

CHROMIUMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_WAIT_MS = 60_000.0


def find_chromium() -> str | None:
    """Return the path of an installed Chromium, or None."""
    return next(filter(None, map(shutil.which, CHROMIUMS)), None)


@contextmanager
def open_browser() -> Iterator[Browser]:
    """Start a headless Chromium.

    Raises:
        SystemExit: There is none.
    """
    program = find_chromium()
    if program is None:
        raise SystemExit(f"None of {', '.join(CHROMIUMS)} is installed. Install one.")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


def generate(page: Page, label: int, seed: int) -> None:
    """Choose a label and a seed, and wait for the image.

    Raises:
        RuntimeError: The page shows an error.
    """
    if page.locator("#class-buttons").is_visible():
        page.locator(f"input[name=class][value='{label}']").check()
    else:
        page.locator("#label").fill(str(label))
    page.locator("#seed").fill(str(seed))
    page.locator("#go").click()
    page.locator("#go:enabled").wait_for(timeout=_WAIT_MS)
    _check(page)


def _check(page: Page) -> None:
    if page.locator("#error").is_visible():
        raise RuntimeError(page.locator("#error").inner_text())


def take_screenshot(
    browser: Browser,
    url: str,
    out: Path,
    *,
    labels: Sequence[int],
    seed: int = 1,
    size: tuple[int, int] = (1000, 720),
    dark: bool = False,
) -> None:
    """Generate an image of each label, the last of which stays on show, and write a picture.

    Args:
        browser: Browser from `open_browser`.
        url: The page.
        out: PNG file, two pixels for one of the page.
        labels: Classes in order.
        seed: Seed of all images.
        size: Width and height of the window.
        dark: Whether the system prefers dark pages.

    Raises:
        RuntimeError: The page shows an error.
    """
    context = browser.new_context(
        viewport={"width": size[0], "height": size[1]},
        device_scale_factor=2,
        color_scheme="dark" if dark else "light",
    )
    page = context.new_page()
    page.goto(url)
    page.locator("#facts span, #error:not([hidden])").first.wait_for()
    _check(page)
    for label in labels:
        generate(page, label, seed)
    page.mouse.move(0, 0)
    page.evaluate("document.activeElement.blur()")
    out.parent.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=out, full_page=True)
    context.close()


def main() -> None:
    """Take one screenshot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("out", type=Path)
    parser.add_argument("--labels", type=int, nargs="+", default=[2, 3, 4, 5, 6, 7])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--width", type=int, default=1000)
    parser.add_argument("--height", type=int, default=640)
    parser.add_argument("--dark", action="store_true")
    options = parser.parse_args()
    try:
        with open_browser() as browser:
            take_screenshot(
                browser,
                options.url,
                options.out,
                labels=options.labels,
                seed=options.seed,
                size=(options.width, options.height),
                dark=options.dark,
            )
    except (Error, RuntimeError, OSError) as error:
        raise SystemExit(f"{options.url}: {' '.join(str(error).split())}") from error


if __name__ == "__main__":
    main()
