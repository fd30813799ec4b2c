"""Use the server's page as a person does, in a real browser, and look at what it shows.

    mcdeploy train digits --out runs/digits && mcdeploy prune-export runs/digits
    python -m venv browser && browser/bin/pip install playwright pillow
    browser/bin/python tests/serving_page.py --python .venv/bin/python --chromium /usr/bin/chromium \
        runs/digits/bundle [runs/ANOTHER/bundle ...]

The first bundle is looked at closely. One whose wiring depends on the image is watched, too. Writes screenshots into
--shots, and one for the README and what was checked to recipes/results/serving_page.png and .json. Exits with 1 when
something is not as it should be.
"""

import argparse
import base64
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import urllib.request
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "recipes" / "results" / "serving_page.json"
KEY = "a-key-for-the-tests-0123456789"
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
DROP = """([name, type, text]) => {
    const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    const files = new DataTransfer();
    files.items.add(new File([bytes], name, { type }));
    document.getElementById("drop").dispatchEvent(
        new DragEvent("drop", { dataTransfer: files, bubbles: true, cancelable: true }));
}"""
ANSWERED = "#result:not([hidden]), #failure:not([hidden])"


DIGITS = {  # 8 x 8, as the digits of scikit-learn are, by the thickness of the ink
    0: ["00389500", "01fdef40", "05f40fb0", "08c00c80", "05800b80", "04b01c60", "03eaec00", "006ed000"],
    1: ["000cd500", "000bg900", "003ff600", "07fgg200", "001gg100", "001gg300", "001gg600", "000bga00"],
    4: ["0001b000", "00078000", "001d6220", "007f09a1", "05gb0g70", "3ggdgf20", "0000g200", "000ba000"],
    7: ["007fgf60", "00854b70", "0000b600", "05cfge40", "05dgb710", "000e7000", "003f2000", "007d0000"],
}


def picture(digit):
    """A handwritten digit as a PNG of 16 x 16."""
    rows = DIGITS[digit]
    image = Image.new("L", (8, 8))
    image.putdata([min(255, 16 * int(letter, 17)) for row in rows for letter in row])
    stream = io.BytesIO()
    image.resize((16, 16), Image.Resampling.BICUBIC).convert("RGB").save(stream, "PNG")
    return stream.getvalue()


@contextmanager
def server(python, bundles, *more):
    command = [python, "-m", "mcruntime.server", *bundles, "--port", "0", *more]
    told = {**os.environ, "PYTHONPATH": str(ROOT / "export")}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=told) as process:
        try:
            said = []
            for line in process.stdout:
                said.append(line)
                if "listening on " in line:
                    break
            else:
                raise SystemExit("".join(said))
            yield line.rpartition("listening on ")[2].strip()
        finally:
            process.terminate()
            process.wait(60)


def ask(url, data=None):
    request = urllib.request.Request(url, data, {"Content-Type": "image/png"} if data else {})
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)


class Checks:
    """What was looked at, and whether it was as it should be."""

    def __init__(self):
        self.rows = []

    def that(self, what, is_so, seen=""):
        self.rows.append({"what": what, "ok": bool(is_so), "seen": str(seen)[:200]})
        print("ok  " if is_so else "FAIL", what, str(seen)[:120])


class Tab:
    """One page that notes what goes wrong in it, and where it goes."""

    def __init__(self, browser, url, **how):
        self.context = browser.new_context(**how)
        self.page = self.context.new_page()
        self.url, self.errors, self.statuses, self.elsewhere = url, [], [], []
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", self._request)
        self.page.goto(url)

    def _console(self, message):
        status = re.search(r"Failed to load resource: .*status of (\d+)", message.text)
        if status:  # a browser says so of every answer of 400 and more
            self.statuses.append(int(status[1]))
        elif message.type in ("error", "warning"):
            self.errors.append(message.text)

    def _request(self, request):
        if not request.url.startswith((self.url, "blob:", "data:")):
            self.elsewhere.append(request.url)

    def drop(self, name, kind, data):
        self.page.evaluate(DROP, [name, kind, base64.b64encode(data).decode()])
        self.until("!document.getElementById('answer').classList.contains('busy')")
        self.page.wait_for_selector(ANSWERED)

    def until(self, script):
        """Wait for something to be true; playwright's way needs eval, which the page's policy forbids."""
        for _ in range(200):
            if self.page.evaluate(script):
                return
            self.page.wait_for_timeout(50)
        raise SystemExit(f"never came true: {script}")

    def text(self, selector):
        return self.page.inner_text(selector)

    def shot(self, path):
        if path is not None:
            self.page.screenshot(path=path, full_page=True)


def use(checks, browser, url, shots, name):
    tab = Tab(browser, url, viewport={"width": 1100, "height": 820})
    tab.page.wait_for_selector("#facts tr")
    image = picture(7)
    tab.page.select_option("#model", label=name)
    tab.until(f"document.title.startsWith({json.dumps(name)})")
    tab.drop("7.png", "image/png", image)
    said, truth = tab.text("#best"), ask(f"{url}/v2/models/{name}/predict", image)
    checks.that("a dropped image gets the class that the server answers", said.startswith(truth["label"]), said)
    labels = tab.page.eval_on_selector_all("#classes .label", "all => all.map((one) => one.textContent)")
    checks.that("the classes come in the server's order", labels == [row["label"] for row in truth["top"]], labels)
    times = tab.text("#times").split()
    checks.that(
        "decode, queue, compute and network are told", {"decode", "queue", "compute", "network"} <= set(times), times
    )
    about = ask(f"{url}/v2/models/{name}/about")
    drawn = tab.page.locator("#wiring path.edge:not(.host)").count()
    checks.that("every edge of the bundle is drawn", drawn == len(about["wiring"]["edges"]), drawn)
    tab.page.locator("#wiring .edge").first.dispatch_event("pointerenter")
    for part in ("#sizes .card", "#certificate details", "#bench tbody tr"):
        checks.that(f"the page has {part}", tab.page.locator(part).count() > 0, tab.page.locator(part).count())
    tab.page.set_input_files("#file", {"name": "chosen.png", "mimeType": "image/png", "buffer": image})
    tab.until("document.getElementById('file-name').textContent.startsWith('chosen.png')")
    checks.that("a file may be chosen, too", "chosen.png" in tab.text("#file-name"), tab.text("#file-name"))
    for _ in range(5):  # a warm engine, as everybody after the first finds it
        tab.page.click("#again")
        tab.until("!document.getElementById('answer').classList.contains('busy')")
    write_picture(tab.page)
    tab.shot(shots and shots / "light.png")
    checks.that("nothing is wrong in the console", not tab.errors and not tab.statuses, (tab.errors, tab.statuses))
    tab.drop("broken.png", "image/png", b"\x89PNG and no more")
    checks.that("what is no image is told in a sentence", "not an image" in tab.text("#failure"), tab.text("#failure"))
    checks.that("only that was refused", tab.statuses == [400] and not tab.errors, (tab.errors, tab.statuses))
    tab.shot(shots and shots / "error.png")
    checks.that("nothing was asked for elsewhere", not tab.elsewhere, tab.elsewhere)
    tab.context.close()


def write_picture(page):
    """The upper part of the page, in few colours, for the README."""
    page.mouse.move(0, 0)
    seen = Image.open(io.BytesIO(page.screenshot(clip={"x": 0, "y": 0, "width": 1100, "height": 985}, full_page=True)))
    seen.convert("RGB").quantize(96, dither=Image.Dither.NONE).save(RESULT.with_suffix(".png"), optimize=True)


def watch(checks, browser, url, shots, name):
    """A wiring that depends on the image: what is drawn is what the server says."""
    tab = Tab(browser, url, viewport={"width": 1100, "height": 820}, color_scheme="dark")
    tab.page.wait_for_selector("#facts tr")
    tab.page.select_option("#model", label=name)
    tab.until(f"document.title.startsWith({json.dumps(name)})")
    told = {digit: ask(f"{url}/v2/models/{name}/wiring", picture(digit))["edges"] for digit in DIGITS}
    digit = min(told, key=lambda one: sum(edge["weight"] > 0 for edge in told[one]))
    truth = told[digit]
    tab.drop(f"{digit}.png", "image/png", picture(digit))
    tab.until(f"document.querySelectorAll('.edge.open, .edge.closed').length === {len(truth)}")
    tab.until("!document.querySelector('.edge.passing')")
    is_open = sum(edge["weight"] > 0 for edge in truth)
    shown = tab.page.locator(".edge.open").count(), tab.page.locator(".edge.closed").count()
    checks.that(f"{name}: the edges that this image opened are shown", shown == (is_open, len(truth) - is_open), shown)
    checks.that(f"{name}: nothing is wrong in the console", not tab.errors and not tab.statuses, tab.errors)
    tab.shot(shots and shots / "watched.png")
    tab.context.close()


def small_screen(checks, browser, url, shots):
    for scheme in ("light", "dark"):
        tab = Tab(browser, url, viewport={"width": 390, "height": 800}, color_scheme=scheme, has_touch=True)
        tab.page.wait_for_selector("#facts tr")
        tab.drop("7.png", "image/png", picture(7))
        width = tab.page.evaluate("document.documentElement.scrollWidth")
        checks.that(f"nothing sticks out of a phone's screen, {scheme}", width <= 390, width)
        back = tab.page.evaluate("getComputedStyle(document.body).backgroundColor")
        checks.that(f"the page is {scheme}", (back == "rgb(255, 255, 255)") == (scheme == "light"), back)
        tab.shot(shots and shots / f"phone_{scheme}.png")
        tab.context.close()


def read_docs(checks, browser, url, shots):
    tab = Tab(browser, f"{url}/docs", viewport={"width": 1100, "height": 820})
    tab.page.wait_for_selector(".operation")
    document = ask(f"{url}/openapi.json")
    wanted = sum(len(item) for item in document["paths"].values())
    shown = tab.page.locator(".operation").count()
    checks.that("every operation is in /docs", shown == wanted, (shown, wanted))
    row = tab.page.locator(".operation", has=tab.page.locator("summary code", has_text=re.compile(r"^/v2$")))
    row.locator("summary").click()
    row.get_by_role("button", name="Try it").click()
    tab.until("[...document.querySelectorAll('.operation pre')].some((one) => one.textContent.startsWith('200'))")
    checks.that("a GET can be tried there", '"extensions"' in row.inner_text(), "")
    checks.that("nothing is wrong in the console of /docs", not tab.errors and not tab.statuses, tab.errors)
    elsewhere = [one for one in tab.elsewhere if not one.startswith(url)]
    checks.that("/docs asks for nothing elsewhere", not elsewhere, elsewhere)
    tab.shot(shots and shots / "docs.png")
    tab.context.close()


def with_key(checks, browser, url, shots):
    tab = Tab(browser, url, viewport={"width": 900, "height": 600})
    tab.page.wait_for_selector("#key:not([hidden])")
    checks.that("a locked server is told", "asks for an API key" in tab.text("#trouble"), tab.text("#trouble"))
    tab.page.fill("#key-text", "a-wrong-key-0123456789")
    tab.page.click("#key button")
    tab.until("document.getElementById('trouble').textContent.includes('not one of')")
    tab.shot(shots and shots / "locked.png")
    tab.page.fill("#key-text", KEY)
    tab.page.click("#key button")
    tab.page.wait_for_selector("#facts tr")
    tab.drop("7.png", "image/png", picture(7))
    checks.that("the right key opens it", tab.page.is_visible("#result"), tab.text("#best"))
    stored = tab.page.evaluate("[Object.keys(localStorage).length, document.cookie]")
    checks.that("the key is kept for this tab alone", stored == [0, ""], stored)
    tab.page.reload()
    tab.page.wait_for_selector("#facts tr")
    checks.that("a reload needs no key again", tab.page.is_hidden("#key"), "")
    checks.that("only 401 was seen, and no other error", set(tab.statuses) == {401} and not tab.errors, tab.errors)
    tab.context.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", help="the first is looked at closely")
    parser.add_argument("--python", default=sys.executable, help="that runs the server")
    parser.add_argument("--chromium", help="default: the one that playwright brought")
    parser.add_argument("--shots", type=Path, help="a folder for screenshots")
    given = parser.parse_args()
    if given.shots:
        given.shots.mkdir(parents=True, exist_ok=True)
    checks = Checks()
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        browser = playwright.chromium.launch(executable_path=given.chromium, args=FLAGS)
        with server(given.python, given.bundles) as url:
            names = [json.loads((Path(bundle) / "manifest.json").read_text())["name"] for bundle in given.bundles]
            use(checks, browser, url, given.shots, names[0])
            for name in names:
                if ask(f"{url}/v2/models/{name}/about")["wiring"]["per_image"]:
                    watch(checks, browser, url, given.shots, name)
            small_screen(checks, browser, url, given.shots)
            read_docs(checks, browser, url, given.shots)
        keys = Path(folder) / "keys"
        keys.write_text(KEY)
        with server(given.python, given.bundles[:1], "--api-keys", str(keys)) as url:
            with_key(checks, browser, url, given.shots)
        told = {"browser": f"chromium {browser.version}, headless", "served": names, "checks": checks.rows}
        browser.close()
    RESULT.write_text(json.dumps(told, indent=2) + "\n")
    failed = [row["what"] for row in checks.rows if not row["ok"]]
    print(f"{len(checks.rows) - len(failed)} of {len(checks.rows)} checks passed")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
