"""The page, in a browser: shots, a question, the streamed answer; with mouse and keys, at two widths."""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import threading
from queue import Empty, Queue

import pytest
from service import alone, asked, fails_behind, health, idle, png, serving, until
from small import small_mm1
from test_generate import picture

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe")  # fmt: skip


class Browser:
    """One tab of Chromium by its DevTools protocol, over a pipe; `complaints`: what its console holds of errors."""

    def __init__(self, folder):
        ours_in, theirs_out = os.pipe()
        theirs_in, ours_out = os.pipe()
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 20) for fd in (theirs_in, theirs_out)]
        shell = f'exec "$0" "$@" 3<&{high[0]} 4>&{high[1]}'
        command = ["bash", "-c", shell, CHROMIUM, *FLAGS, f"--user-data-dir={folder}", "about:blank"]
        self.process = subprocess.Popen(command, pass_fds=high, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        for fd in (*high, theirs_in, theirs_out):
            os.close(fd)
        self.out, self.answers, self.choosers = os.fdopen(ours_out, "wb"), Queue(), Queue()
        self.complaints, self.session, self.last = [], None, 0
        threading.Thread(target=self._read, args=(os.fdopen(ours_in, "rb"),), daemon=True).start()
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self.session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "DOM"):
            self(f"{domain}.enable")
        self("Page.setInterceptFileChooserDialog", enabled=True)

    def _read(self, file):
        rest = b""
        while piece := file.read1(1 << 16):
            *messages, rest = (rest + piece).split(b"\0")
            for message in map(json.loads, messages):
                method, of = message.get("method"), message.get("params", {})
                if "id" in message:
                    self.answers.put(message)
                elif method == "Page.fileChooserOpened":
                    self.choosers.put(of["backendNodeId"])
                elif method == "Runtime.exceptionThrown" or (
                    method == "Log.entryAdded" and of["entry"]["level"] == "error"
                ) or (method == "Runtime.consoleAPICalled" and of["type"] == "error"):  # fmt: skip
                    self.complaints.append(of)

    def __call__(self, method, **of):
        self.last += 1
        message = {"id": self.last, "method": method, "params": of}
        self.out.write(json.dumps(message | ({"sessionId": self.session} if self.session else {})).encode() + b"\0")
        self.out.flush()
        while True:
            try:
                answer = self.answers.get(timeout=60)
            except Empty:
                raise AssertionError(f"no answer to {method}") from None
            if answer["id"] == self.last:
                assert "error" not in answer, answer
                return answer["result"]

    def __getitem__(self, expression):
        found = self("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def click(self, selector):
        middle = f"""(() => {{ const e = document.querySelector({json.dumps(selector)});
            e.scrollIntoView({{block: "center"}});
            const r = e.getBoundingClientRect();
            return [r.x + r.width / 2, r.y + r.height / 2]; }})()"""
        x, y = self[middle]
        for kind in ("mousePressed", "mouseReleased"):
            self("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def type(self, selector, text):
        self.click(selector)
        self("Input.insertText", text=text)

    def key(self, key, code, modifiers=0):
        for kind in ("rawKeyDown", "keyUp"):
            self("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, modifiers=modifiers)

    def choose(self, selector, *paths):
        self.click(selector)
        self("DOM.setFileInputFiles", files=list(map(str, paths)), backendNodeId=self.choosers.get(timeout=60))

    def picture(self, path, width, height):
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500)
        shot = self("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(shot))

    def close(self):
        self.session = None
        self("Browser.close")
        self.process.wait(60)


@pytest.fixture(scope="module")
def model():
    return small_mm1(seed=5).eval()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


@pytest.fixture
def files(tmp_path):
    paths = []
    for seed in range(3):
        paths.append(tmp_path / f"{seed}.png")
        paths[-1].write_bytes(png(picture(24, 24, seed)))
    return paths


@pytest.fixture
def page(browser, model):
    with serving(model) as (port, _):
        opened(browser, port)
        yield browser, port
    assert not browser.complaints


def opened(browser, port):
    browser.complaints.clear()
    browser("Page.navigate", url=f"http://127.0.0.1:{port}/")
    until(lambda: browser["document.readyState"] == "complete" and browser["$('model').textContent"] == "small")


def answered(browser):
    return browser["!$('ask').disabled"] and browser["$('status').textContent || $('error').textContent"]


SHOTS = '[...document.querySelectorAll("#shots img")].map(e => e.src)'


def shot(browser, row, column):
    return f"#shots li:nth-child({row}) input:nth-of-type({column})"


def test_shots_and_a_question_are_asked_as_the_demo_was_trained(page, model, files, tmp_path):
    browser, _ = page
    browser.type("#opening", "quiz\n")
    browser.choose("[data-choose=shots]", *files[:2])
    until(lambda: len(browser[SHOTS]) == 2)
    browser.type(shot(browser, 1, 2), "one")
    browser.type(shot(browser, 2, 1), "question: how many twos? answer:")
    browser.type(shot(browser, 2, 2), "none")
    browser.choose("[data-choose=images]", files[2])
    until(lambda: browser["images.length"] == 1)
    browser.type("#question", "question: how many sevens? answer:")
    browser.click("#line")
    browser.click("#ask")
    until(lambda: answered(browser))
    a, b, c = (picture(24, 24, seed) for seed in range(3))
    prompt = ["quiz\n", a, "question: how many sevens? answer: one\n", b, "question: how many twos? answer: none\n",
              c, "question: how many sevens? answer:"]  # fmt: skip
    truth = alone(model, prompt, 64)
    assert truth.text
    assert browser["$('answer').textContent"] == truth.text
    assert f"{len(truth.document.tokens)} + {len(truth.tokens)} tokens" in browser["$('status').textContent"]
    for width, height in ((1280, 800), (390, 1300)):
        browser.picture(tmp_path / f"{width}.png", width, height)
        assert browser["document.documentElement.scrollWidth"] == width
    browser("Emulation.clearDeviceMetricsOverride")


def test_shots_are_moved_and_deleted(page, files):
    browser, _ = page
    browser.choose("[data-choose=shots]", *files)
    until(lambda: len(browser[SHOTS]) == 3)
    a, b, c = browser[SHOTS]
    browser.click('[aria-label="move shot 1 down"]')
    assert browser[SHOTS] == [b, a, c]
    browser("Input.dispatchKeyEvent", type="keyDown", key="Enter", windowsVirtualKeyCode=13, text="\r")
    assert browser["document.activeElement.getAttribute('aria-label')"].startswith("move shot")
    browser("Input.dispatchKeyEvent", type="keyUp", key="Enter", windowsVirtualKeyCode=13)
    assert browser[SHOTS] == [a, b, c]
    browser.click('[aria-label="move shot 3 up"]')
    browser.click('[aria-label="delete shot 1"]')
    assert browser[SHOTS] == [c, b]


def test_images_can_be_dropped(page):
    browser, _ = page
    drop = """(type, name, where) => {
        const dataTransfer = new DataTransfer();
        dataTransfer.items.add(new File(["x"], name, {type}));
        const event = new DragEvent("drop", {dataTransfer, bubbles: true, cancelable: true});
        document.querySelector(where).dispatchEvent(event); }"""
    browser[f"({drop})('image/png', 'a.png', '[data-drop=shots]')"]
    browser[f"({drop})('image/png', 'b.png', '[data-drop=images] p')"]
    until(lambda: browser["[shots.length, images.length]"] == [1, 1])
    browser[f"({drop})('text/plain', 'c.txt', '[data-drop=images]')"]
    until(lambda: browser["$('error').textContent"] == "c.txt is no image")
    browser.complaints.clear()  # of images that hold an x


def test_stop_ends_the_answer_on_the_server_too(page):
    browser, port = page
    browser["$('tokens').value = 7000, $('line').checked = false, 0"]
    for stop in (lambda: browser.click("#stop"), lambda: browser.key("Escape", 27)):
        browser["$('question').value = '', 0"]
        browser.type("#question", "one")
        browser.key("Enter", 13, modifiers=2)
        until(lambda: browser["$('answer').textContent.length"] > 10)
        assert health(port)["running"] == 1
        stop()
        until(lambda: answered(browser) == "stopped")
        until(lambda: idle(port))
    assert asked(port, "GET", "/metrics")[0] == 200


def test_errors_are_one_line_and_the_key_is_sent(browser, model):
    with serving(model, key="sesame") as (port, _):
        opened(browser, port)
        browser.click("#ask")
        until(lambda: answered(browser))
        assert browser["$('error').textContent"] == "wrong or missing API key"
        assert browser["$('error').getBoundingClientRect().height"] < 40
        browser.type("#key", "sesame")
        browser.type("#question", "one")
        browser.click("#ask")
        until(lambda: answered(browser))
        assert browser["$('error').textContent"] == ""
        assert browser["$('answer').textContent"]
    browser.complaints.clear()  # of the 401
    browser.click("#ask")
    until(lambda: answered(browser))
    assert "fetch" in browser["$('error').textContent"]


def test_an_error_in_the_middle_of_an_answer_is_shown_below_it(browser, model):
    with serving(model) as (port, service):
        opened(browser, port)
        fails_behind(20, service.engine.engine)
        browser.type("#question", "which")
        browser.click("#ask")
        until(lambda: answered(browser))
        assert browser["$('error').textContent"].startswith("internal error")
        assert browser["$('answer').textContent"]
    assert not browser.complaints


def test_nothing_but_itself_runs_in_it(model):
    with serving(model) as (port, _):
        _, headers, body = asked(port, "GET", "/")
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert b"http://" not in body
    assert b"https://" not in body
    assert body.count(b"\n") < 350
