"""The page in a real browser: headless Chromium, driven by selenium."""

import json
import shutil
import time

import pytest

from mlx_drift.demo import QUESTION
from scripted import scripted_checkpoint
from serving import PATIENCE, server

pytestmark = pytest.mark.long
BROWSERS = "chromium", "chromium-browser", "google-chrome", "chrome"
SIZES = [(1600, 900), (1400, 900), (800, 900), (400, 800)]
ESCAPE = "\ue00c"  # as WebDriver spells it


@pytest.fixture(scope="module")
def driver():
    """A browser; without one, or selenium, there is nothing to test with."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("there is no Chromium with its chromedriver on the PATH")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    running = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield running
    running.quit()


@pytest.fixture(scope="module")
def running():
    with server("--max-tokens", "48") as process:
        yield process


class Page:
    """The page, as someone uses it."""

    def __init__(self, driver, root):
        self.driver = driver
        self.root = root
        driver.get(f"{root}/page/icon.svg")  # of the same origin, and keeps nothing when left
        self.run("sessionStorage.clear()")
        driver.get_log("browser")
        driver.get_log("performance")
        driver.get(f"{root}/")

    def run(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def find(self, selector):
        return self.driver.find_element("css selector", selector)

    def all(self, selector):
        return self.driver.find_elements("css selector", selector)

    def until(self, script):
        deadline = time.monotonic() + PATIENCE
        while not (found := self.run(f"return {script}")):
            assert time.monotonic() < deadline, (script, self.find("#status").text)
            time.sleep(0.05)
        return found

    def send(self, text):
        self.find("#text").send_keys(text + "\n")

    def answered(self):
        self.until("document.getElementById('status').textContent.startsWith('answered')")

    def last(self):
        return self.run(
            "return [...document.querySelectorAll('.assistant .said')].at(-1).textContent"
        )

    def look(self, width, height, dark):
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})

    def check_quiet(self):
        """No message on the console, and no request to anywhere else."""
        loud = [e for e in self.driver.get_log("browser") if e["level"] not in ("DEBUG", "INFO")]
        assert not loud
        for entry in self.driver.get_log("performance"):
            event = json.loads(entry["message"])["message"]
            if event["method"] == "Network.requestWillBeSent":
                url = event["params"]["request"]["url"]
                assert url.startswith((f"{self.root}/", "data:")), url


@pytest.fixture
def page(driver, running):
    page = Page(driver, running.root)
    yield page
    page.check_quiet()


def test_it_sends_streams_and_draws(page):
    page.send(QUESTION)
    page.until("document.querySelectorAll('.assistant .t').length > 2")  # while it is answered
    page.answered()
    text = page.last()
    rounds = len(page.all("#rounds rect"))
    assert text.startswith("```python\ndef quote(s):")
    assert rounds > 3
    for said in ("draft 1", "draft 2", "draft 3"):
        spans = page.all(f".assistant .t[title='{said}']")
        assert spans
        assert {span.get_attribute("data-mark").strip("␣") for span in spans} == {said[-1]}
    colours = {
        page.run("return getComputedStyle(arguments[0]).backgroundColor", page.find(f".t.{kind}"))
        for kind in ("d1", "d2", "d3")
    }
    styles = {
        page.run(
            "return getComputedStyle(arguments[0]).textDecorationStyle", page.find(f".t.{kind}")
        )
        for kind in ("d1", "d2", "d3")
    }
    assert len(colours) == len(styles) == 3
    assert "draft 3" in page.find("#legend").text
    assert "plain decoding" in page.find("#speed-said").text
    assert "tokens were in the cache" in page.find("#cached-said").text
    page.find("#marks").click()
    colour = page.run("return getComputedStyle(document.querySelector('.t.d1')).backgroundColor")
    assert colour == "rgba(0, 0, 0, 0)"
    assert page.last() == text
    page.find("#marks").click()


def test_it_stops_reloads_and_goes_on(page):
    page.run("document.getElementById('settings').open = true")
    page.find("#most").send_keys("400")
    page.send(QUESTION)
    page.until("document.querySelectorAll('.assistant .t').length > 2")
    page.find("#text").send_keys(ESCAPE)
    page.until("document.getElementById('status').textContent === 'stopped'")
    text = page.last()
    assert text
    page.find("#text").send_keys("half a")
    page.driver.refresh()
    page.until("document.querySelectorAll('.assistant').length")
    assert page.last() == text
    assert page.find("#most").get_attribute("value") == "400"
    assert page.find("#text").get_attribute("value") == "half a"
    assert page.find(".assistant .note").text == "stopped"
    assert page.all(".assistant .t")
    page.run("document.getElementById('most').value = '8'")
    page.send(" question")
    page.answered()
    assert len(page.all(".message")) == 4
    assert int(page.find("#cached-said").text.split()[0]) > 10  # the first turn's


def test_what_the_model_says_is_text(page):
    """Markup in a message stays what it is, in the page and after a reload."""
    markup = "<img src=x onerror=alert(1)><b>bold</b>"
    page.run("document.getElementById('most').value = '4'")
    page.send(markup)
    page.answered()
    page.driver.refresh()
    page.until("document.querySelectorAll('.user').length")
    assert page.find(".user .said").text == markup
    assert not page.all(".said img, .said b")


def test_reasoning_stands_before_the_answer(driver, tmp_path):
    script = {"[[think]]": "<think>\nFirst, second.\n</think>\n\nSo it is five."}
    model = scripted_checkpoint(tmp_path / "scripted", script)
    with server("--model", model, "--drafter", "prompt-lookup") as process:
        page = Page(driver, process.root)
        page.send("Hi [[think]]")
        page.answered()
        for _ in range(2):
            assert page.find(".assistant .reasoning").text == "First, second."
            assert page.last() == "So it is five."
            driver.refresh()
            page.until("document.querySelectorAll('.assistant').length")
        page.check_quiet()


def test_settings_and_curl(page):
    page.run("document.getElementById('settings').open = true")
    page.run("document.getElementById('request').open = true")
    page.find("#drafts").click()
    page.find("#temperature").send_keys("0.5")
    page.find("#most").send_keys("5")
    page.find("#text").send_keys("It's")
    command = page.find("#curl").text
    body = command[command.index("-d '") + 4 : -1].replace("'\\''", "'")
    assert json.loads(body) == {
        "model": "mlx-drift-demo",
        "messages": [{"role": "user", "content": "It's"}],
        "temperature": 0.5,
        "max_tokens": 5,
        "num_draft_tokens": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "speculative": {"tokens": True},
    }
    page.find("#text").send_keys("\n")
    page.answered()
    assert not page.all(".assistant .t")
    assert page.find("#rounds-said").text == "No drafts: plain decoding."


def test_the_drift_panel(page):
    page.run("document.getElementById('inside').open = true")
    page.find("#watch").click()
    page.send(QUESTION)
    page.answered()
    rows = page.all("#drift tbody tr")
    assert len(rows) == 3  # the server's drafts a round
    for row in rows:
        _, rms, *masses = map(float, row.text.split())
        assert rms > 0
        assert sum(masses) == pytest.approx(1, abs=0.03)
    assert len(page.all("#drift .mass")) == 15
    assert "at step 3" in page.find("#drift-said").text


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_it_fits_and_everyone_can_use_it(page, size, dark):
    """Nothing sticks out at the side, and axe finds nothing."""
    axe = pytest.importorskip("axe_core_python.selenium", reason="axe-core-python: not installed")
    page.look(*size, dark)
    page.run("document.getElementById('most').value = '16'")
    page.run("document.getElementById('watch').checked = true")
    page.send(QUESTION)
    page.answered()
    page.run("for (const one of document.querySelectorAll('details')) one.open = true")
    assert page.run("return document.documentElement.scrollWidth <= innerWidth")
    found = axe.Axe().run(page.driver)
    assert [(v["id"], v["impact"], v["nodes"][0]["html"]) for v in found["violations"]] == []


def test_a_key_is_asked_for_and_taken(driver):
    with server("--api-key", "secret", "--max-tokens", "8") as process:
        page = Page(driver, process.root)
        page.until("document.getElementById('status').textContent.includes('API key')")
        page.run("document.getElementById('settings').open = true")
        page.find("#key").send_keys("secret\t")
        page.until("document.getElementById('model-shown').textContent")
        page.send(QUESTION)
        page.answered()
        assert "secret" not in page.run("return document.getElementById('curl').textContent")
        assert "$MLX_DRIFT_API_KEY" in page.run(
            "return document.getElementById('curl').textContent"
        )
