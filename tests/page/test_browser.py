"""The page in a real browser, headless Chromium, driven by the WebDriver protocol: skipped where there is none."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
from http.client import HTTPConnection
from pathlib import Path

import pytest

from fxc.artifact.manifest import PAGE

DRIVER = shutil.which("chromedriver")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(not (DRIVER and BROWSER), reason="no chromium with its driver: apt-get install chromium-driver")


class Browser:
    def __init__(self, port: int):
        self.port, self.base = port, ""
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1200,900"]
        chrome = {"binary": BROWSER, "args": flags}
        wanted = {"browserName": "chrome", "goog:chromeOptions": chrome, "goog:loggingPrefs": {"browser": "ALL"}}
        made = self.ask("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self.base += f"/session/{made['sessionId']}"

    def ask(self, method: str, path: str, body: dict | None = None):
        data = None if body is None else json.dumps(body).encode()
        with contextlib.closing(HTTPConnection("localhost", self.port, timeout=60)) as connection:
            connection.request(method, self.base + path, data, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            value = json.load(answer)["value"]
        assert answer.status == 200, value
        return value

    def run(self, script: str):
        return self.ask("POST", "/execute/sync", {"script": script, "args": []})

    def open(self, path: Path) -> list:
        """The page; what its console says of it."""
        self.ask("POST", "/url", {"url": path.resolve().as_uri()})
        return self.said()

    def said(self) -> list:
        """What its console has said since it was asked."""
        return self.ask("POST", "/se/log", {"type": "browser"})

    def chrome(self, command: str, parameters: dict) -> dict:
        return self.ask("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    # A home of its own: whose machine this is, Chromium keeps nothing of the run.
    own = {**os.environ, "HOME": str(tmp_path_factory.mktemp("home"))}
    driver = subprocess.Popen([DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=own)
    try:
        for _ in range(100):
            with contextlib.suppress(OSError), socket.create_connection(("localhost", port), timeout=1):
                break
            time.sleep(0.1)
        made = Browser(port)
        yield made
        made.ask("DELETE", "")
    finally:
        driver.terminate()
        driver.wait(timeout=20)


ROWS = 'Array.from(document.querySelectorAll("#layers tbody tr"))'
SHOWN = f"return {ROWS}.filter(r => !r.hidden).map(r => r.cells[0].textContent)"


def test_the_page_renders_sorts_and_filters_without_an_error(browser, saved):
    assert browser.open(saved / PAGE) == []
    assert browser.run(SHOWN) == ["0", "2", "4"]
    assert browser.run('return document.getElementById("shown").textContent') == "3 of 3"
    click = 'document.querySelectorAll("#layers th button")[{}].click()'
    browser.run(click.format(5))
    assert browser.run(SHOWN)[-1] == "4", "the most bytes come first"
    browser.run(click.format(5))
    assert browser.run(SHOWN)[0] == "4"
    assert browser.run('return document.querySelectorAll("#layers th")[5].getAttribute("aria-sort")') == "ascending"
    browser.run(click.format(7))
    assert browser.run(SHOWN)[-1] == "4", "what has no error comes last"
    browser.run(click.format(0))
    search = 'const f = document.getElementById("find"); f.value = "{}"; f.dispatchEvent(new Event("input"))'
    browser.run(search.format("skip PATTERN"))
    assert browser.run(SHOWN) == ["4"]
    browser.run(search.format(""))
    browser.run('const k = document.getElementById("kind"); k.value = "packed"; k.dispatchEvent(new Event("change"))')
    assert sorted(browser.run(SHOWN)) == ["0", "2"]
    browser.run('document.querySelector("details summary").click()')
    assert browser.run('return document.querySelector("details").open')
    assert browser.run('return document.querySelector("details pre").getBoundingClientRect().height') > 20
    assert browser.ask("POST", "/se/log", {"type": "browser"}) == []


def test_the_page_fits_a_phone_and_is_dark_where_that_is_wished(browser, saved):
    phone = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    browser.chrome("Emulation.setDeviceMetricsOverride", phone)
    browser.open(saved / PAGE)
    assert browser.run("return document.documentElement.scrollWidth") <= 360, "only tables scroll sideways"
    back = "return getComputedStyle(document.body).backgroundColor"
    colors = []
    for scheme in ("light", "dark"):
        wished = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        browser.chrome("Emulation.setEmulatedMedia", wished)
        colors.append(browser.run(back))
    assert colors == ["rgb(255, 255, 255)", "rgb(13, 17, 23)"]
    browser.chrome("Emulation.clearDeviceMetricsOverride", {})


def test_a_script_that_got_in_would_not_run(browser, saved, tmp_path):
    changed = (saved / PAGE).read_text().replace("</h1>", "</h1><script>document.title = 'owned'</script><img src=x>")
    (tmp_path / "changed.html").write_text(changed)
    said = browser.open(tmp_path / "changed.html")
    assert browser.run("return document.title") != "owned"
    for _ in range(50):  # what was refused may be said after the page is there
        if len(refused := [each for each in said if "Content Security Policy" in each["message"]]) >= 2:
            break
        time.sleep(0.1)
        said += browser.said()
    assert len(refused) >= 2
