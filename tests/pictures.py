"""Make docs/page.png and docs/samples.png of the demo's run: python tests/pictures.py runs/demo

It serves the run, opens the page in Chromium, asks the example of the page, and takes a screenshot.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from browser import CHROMIUM, Browser
from service import wait_until

DOCS = Path(__file__).parent.parent / "docs"


def draw_page(run: Path, out: Path) -> str:
    """Draw the page with the answer of a run's model to its example, and return the answer."""
    assert CHROMIUM, "Chromium is missing"
    command = [sys.executable, "-m", "mm1", "serve", str(run), "--port", "0"]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server,
        tempfile.TemporaryDirectory() as folder,
    ):
        try:
            name, _, url = server.stdout.readline().strip().partition(": ")
            browser = Browser(folder)
            try:
                browser("Page.navigate", url=url)
                wait_until(lambda: browser["document.readyState"] == "complete")
                wait_until(lambda: browser["$('model').textContent"] == name)
                browser.click("#example")
                wait_until(lambda: browser["images.length && shots.length"])
                browser.click("#ask")
                wait_until(lambda: browser["!$('ask').disabled && $('status').textContent"])
                browser["scrollTo(0, 0)"]
                browser.picture(out, 1265, 852)
                return browser["$('answer').textContent"]
            finally:
                browser.close()
        finally:
            server.terminate()


def main(run: Path) -> None:
    shutil.copy(run / "samples.png", DOCS)
    print(f"docs/samples.png, docs/page.png (answer: {draw_page(run, DOCS / 'page.png')!r})")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
