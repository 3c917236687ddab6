"""What fails a test in the browser: the fixtures themselves, on pages with faults."""

from pathlib import Path

import pytest

pytestmark = pytest.mark.browser

FAULTS = {
    "console: it is broken": "<script>console.error('it is broken')</script>",
    "exception: broken": "<script>throw new Error('broken')</script>",
    "request beyond this machine: http://fonts.invalid/a.png": "<img src='http://fonts.invalid/a.png'>",
    "websocket beyond this machine: ws://live.invalid/": "<script>new WebSocket('ws://live.invalid')</script>",
    "console: Failed to load resource": "<img src='none.png'>",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(fault, page, faults, tmp_path: Path):
    path = tmp_path / "page.html"
    path.write_text(f"<title>A page</title>{FAULTS[fault]}")
    page.goto(path.as_uri())
    page.evaluate("1")
    assert any(found.startswith(fault) for found in faults), faults
    faults.clear()  # or they would fail this test


def test_a_page_without_faults_has_none(page, faults, tmp_path: Path):
    path = tmp_path / "page.html"
    path.write_text(
        "<title>A page</title><img src='data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAA='>"
        "<script>console.log('all is well'); fetch('data:,x')</script>"
    )
    page.goto(path.as_uri())
    assert page.title() == "A page"
    assert faults == []
