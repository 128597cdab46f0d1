"""The page in a real headless Chromium, where one and Playwright are installed: budgets side by side, tokens, memory, batch."""

import shutil

import pytest

playwright = pytest.importorskip("playwright.sync_api")
pytest.importorskip("openai")
pytest.importorskip("fastapi")

from test_api import IDS, KEY, parent, server  # noqa: E402, F401

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium")


@pytest.fixture
def page(server):  # noqa: F811
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page()
        asked, errors = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(f"http://127.0.0.1:{server[0]}/")
        yield page
        assert errors == [] and all(url.startswith(f"http://127.0.0.1:{server[0]}/") for url in asked)
        browser.close()


def test_budgets_answer_side_by_side(page):
    page.wait_for_selector("text=enter the API key")
    page.fill("#key", KEY)
    page.dispatch_event("#key", "change")
    page.wait_for_selector("#budgets input")
    assert [box.get_attribute("value") for box in page.query_selector_all("#budgets input")] == IDS
    page.uncheck("#chat")
    page.fill("#tokens", "60")
    page.fill("#prompt", "How now?")
    page.click("#send")
    page.wait_for_function("document.querySelectorAll('.answer[data-done]').length === 3", timeout=60_000)
    for box in page.query_selector_all(".answer"):
        assert "tokens/s" in box.inner_text() and box.query_selector("pre").inner_text().strip()
    page.wait_for_function("document.querySelectorAll('#memory span').length >= 3")
    assert "image, once for all budgets" in page.inner_text("#memorytext")
    assert len(page.query_selector_all("#batch i")) == 8


def test_an_answer_can_be_stopped_and_an_error_is_shown(page, server):  # noqa: F811
    page.fill("#key", KEY)
    page.dispatch_event("#key", "change")
    page.wait_for_selector("#budgets input")
    page.fill("#tokens", "9000")
    page.click("#send")
    page.wait_for_selector(".answer .error")
    assert "600 tokens together" in page.inner_text(".answer .error")
