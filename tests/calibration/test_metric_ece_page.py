"""The page of the Space in a real browser: a CSV goes in, the right number and a diagram come out."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from first_trl.calibration import expected_calibration_error
from first_trl.metrics.ece import build_space_folder


pytestmark = pytest.mark.slow


@pytest.fixture
def page(tmp_path: Path) -> Iterator[str]:
    """Address of the app, run from a published folder on the loopback interface."""
    pytest.importorskip("gradio", reason="needs gradio")
    pytest.importorskip("evaluate", reason="needs evaluate")
    folder = build_space_folder(tmp_path / "ece", repo_id="someone/ece")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "GRADIO_SERVER_NAME": "127.0.0.1",
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_ANALYTICS_ENABLED": "False",
        "HF_HUB_OFFLINE": "1",
        "USE_TORCH": "0",
    }
    server = subprocess.Popen([sys.executable, "app.py"], cwd=folder, env=environment)
    address = f"http://127.0.0.1:{port}/"
    try:
        for _ in range(180):
            assert server.poll() is None, "the app ended"
            try:
                urllib.request.urlopen(address, timeout=5)
                break
            except OSError:
                time.sleep(1)
        yield address
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture
def browser() -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("needs chromium and chromedriver")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,1250"):
        options.add_argument(flag)
    options.binary_location = chromium
    window = webdriver.Chrome(service=Service(driver), options=options)
    yield window
    window.quit()


def wait_for(condition: Any, seconds: int = 90) -> Any:
    for _ in range(seconds * 2):
        found = condition()
        if found:
            return found
        time.sleep(0.5)
    raise AssertionError("nothing appeared on the page")


def test_a_csv_dropped_in_is_scored_and_drawn(page: str, browser: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    confidence = rng.beta(5, 1.5, 800).round(4)
    correct = (rng.random(800) < confidence**2).astype(int)
    table = tmp_path / "answers.csv"
    table.write_text("confidence,correct\n" + "".join(f"{c},{y}\n" for c, y in zip(confidence, correct, strict=True)))
    browser.get(page)
    wait_for(lambda: browser.find_elements("css selector", "input[type=file]"))[0].send_keys(str(table))
    want = expected_calibration_error(confidence, correct)
    wait_for(lambda: f"{want:.6f}" in browser.find_element("tag name", "body").text)
    image = wait_for(lambda: browser.find_elements("css selector", "img[src^='data:image']"))[0]
    assert image.size["width"] > 200 and image.size["height"] > 200
    # A control changes the number at once.
    left = expected_calibration_error(confidence, correct, norm="max")
    next(
        e for e in browser.find_elements("css selector", "input[type=radio]") if e.get_attribute("value") == "max"
    ).click()
    wait_for(lambda: f"{left:.6f}" in browser.find_element("tag name", "body").text)
    assert browser.save_screenshot(str(tmp_path / "page.png"))
