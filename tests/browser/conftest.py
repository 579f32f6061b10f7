"""The browser that all tests of this folder share."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.browser.chromium import Browser, Page, browser, find


@pytest.fixture(scope="session")
def running() -> Iterator[Browser]:
    if find() is None:
        pytest.skip("there is no Chromium: install Debian's `chromium`, or set CHROMIUM to one")
    with browser() as found:
        yield found


@pytest.fixture
def open_page(running: Browser, tmp_path: Path) -> Iterator[Callable[..., Page]]:
    """`open_page(html)`: the page in a tab. At the end it must have asked for nothing and
    complained of nothing."""
    opened: list[Page] = []

    def open_one(text: str, **how) -> Page:
        path = tmp_path / f"page{len(opened)}.html"
        path.write_text(text, encoding="utf-8")
        opened.append(Page(running, path, **how))
        return opened[-1]

    yield open_one
    found = [(page.complaints, page.requests) for page in opened]
    for page in opened:
        page.close()
    assert found == [([], [])] * len(opened)
