"""Control Chromium, to test the page of the server and to draw it."""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import threading
from queue import Empty, Queue

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe")  # fmt: skip


class Browser:
    """Control one tab of Chromium by its DevTools protocol, over a pipe. complaints: the errors in its console."""

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
