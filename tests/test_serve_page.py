"""The page, in a browser: shots, a question, the streamed answer; with mouse and keys, at two widths."""

import base64
import json
import time
from io import BytesIO

import numpy as np
import pytest
from browser import CHROMIUM, Browser
from PIL import Image
from service import (
    data_url,
    fail_after,
    health,
    http_request,
    is_idle,
    metric,
    png,
    run_alone,
    serving,
    slow_steps,
    wait_until,
)
from small import small_mm1
from test_generate import picture

from mm1.engine.data.images import decode
from mm1.engine.data.references import read_image


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
    wait_until(lambda: browser["document.readyState"] == "complete" and browser["$('model').textContent"] == "small")


def answered(browser):
    return browser["!$('ask').disabled"] and browser["$('status').textContent || $('error').textContent"]


SHOTS = '[...document.querySelectorAll("#shots img")].map(e => e.src)'


def shot(browser, row, column):
    return f"#shots li:nth-child({row}) input:nth-of-type({column})"


def test_shots_and_a_question_are_asked_as_the_demo_was_trained(page, model, files, tmp_path):
    browser, _ = page
    browser.type("#opening", "quiz\n")
    browser.choose("[data-choose=shots]", *files[:2])
    wait_until(lambda: len(browser[SHOTS]) == 2)
    browser.type(shot(browser, 1, 2), "one")
    browser.type(shot(browser, 2, 1), "question: how many twos? answer:")
    browser.type(shot(browser, 2, 2), "none")
    browser.choose("[data-choose=images]", files[2])
    wait_until(lambda: browser["images.length"] == 1)
    browser.type("#question", "question: how many sevens? answer:")
    browser.click("#line")
    browser.click("#ask")
    wait_until(lambda: answered(browser))
    a, b, c = (picture(24, 24, seed) for seed in range(3))
    prompt = ["quiz\n", a, "question: how many sevens? answer: one\n", b, "question: how many twos? answer: none\n",
              c, "question: how many sevens? answer:"]  # fmt: skip
    truth = run_alone(model, prompt, 64)
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
    wait_until(lambda: len(browser[SHOTS]) == 3)
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


DROP = """(base64, type, name, where) => {
    const bytes = Uint8Array.from(atob(base64), c => c.charCodeAt(0)), dataTransfer = new DataTransfer();
    dataTransfer.items.add(new File([bytes], name, {type}));
    const event = new DragEvent("drop", {dataTransfer, bubbles: true, cancelable: true});
    document.querySelector(where).dispatchEvent(event); }"""


def drop(browser, data, kind, name, where):
    browser[f"({DROP})({json.dumps(base64.b64encode(data).decode())}, '{kind}', '{name}', '{where}')"]


def near(browser, element, error):
    """Whether what is wrong stands in the section of what it is about."""
    return browser[
        f"document.querySelector('{element}').closest('section').contains(document.querySelector('{error}'))"
    ]


def test_images_can_be_dropped_and_what_is_broken_is_refused_then(page, files):
    browser, _ = page
    good = files[0].read_bytes()
    drop(browser, good, "image/png", "a.png", "[data-drop=shots]")
    drop(browser, good, "image/png", "b.png", "[data-drop=images] p")
    wait_until(lambda: browser["[shots.length, images.length]"] == [1, 1])
    assert browser["shots[0].url"] == browser["images[0].url"] == data_url(good)
    drop(browser, b"text", "text/plain", "c.txt", "[data-drop=images]")
    wait_until(lambda: browser["$('error').textContent"] == "c.txt is no image")
    assert near(browser, "#images", "#error")
    for broken in (b"x", good[:40]):
        browser["showError('')"]
        drop(browser, broken, "image/png", "d.png", "[data-drop=shots]")
        wait_until(lambda: browser["$('error').textContent"].startswith("d.png is broken"))
        assert near(browser, "#shots", "#error")
    assert browser["[shots.length, images.length]"] == [1, 1]


def test_a_large_photograph_is_sent_small_and_upright(page):
    browser, _ = page
    photo, exif, file = Image.new("RGB", (3000, 1000), "blue"), Image.Exif(), BytesIO()
    photo.paste("red", (0, 0, 1500, 1000))  # left half, which stands on top once it is turned
    exif[0x0112] = 6
    photo.save(file, "JPEG", exif=exif)
    drop(browser, file.getvalue(), "image/jpeg", "photo.jpg", "[data-drop=images]")
    wait_until(lambda: browser["images.length"] == 1)
    sent = decode(read_image(browser["images[0].url"], None))
    assert sent.size == (448, 1344)
    top, bottom = (sent.getpixel((224, y)) for y in (200, 1144))
    assert top[0] > 200 > 50 > top[2]
    assert bottom[2] > 200 > 50 > bottom[0]


@pytest.mark.parametrize("form, mode, kind", [
    ("WEBP", "RGB", "image/jpeg"), ("WEBP", "RGBA", "image/png"), ("PNG", "RGB", "image/jpeg"),
    ("PNG", "L", "image/png"), ("WEBP", "L", "image/jpeg"),
])  # fmt: skip
def test_a_large_file_is_sent_as_jpeg_unless_that_would_spoil_it(page, form, mode, kind):
    """Noise makes PNG large; a drawing, here grey, stays a small PNG; what is transparent cannot be JPEG."""
    browser, _ = page
    pixels = np.random.default_rng(0).integers(0, 256, (1000, 1400, 4), np.uint8)
    image, file = Image.fromarray(pixels).convert(mode) if mode != "L" else Image.new("L", (1400, 1000), 128), BytesIO()
    image.save(file, form)
    drop(browser, file.getvalue(), f"image/{form.lower()}", "photo", "[data-drop=images]")
    wait_until(lambda: browser["images.length"] == 1)
    assert browser["images[0].url.split(';')[0]"] == f"data:{kind}"
    assert max(decode(read_image(browser["images[0].url"], None)).size) == 1344


def test_a_bitmap_is_given_back_whether_or_not_the_file_is_written_anew(page, files):
    browser, _ = page
    browser["window.made = [], 0"]
    browser[
        """window.create = createImageBitmap, createImageBitmap = async file => {
        const bitmap = await create(file);
        made.push(bitmap);
        return bitmap; }, 0"""
    ]
    large, file = Image.new("RGB", (3000, 100)), BytesIO()
    large.save(file, "PNG")
    for data in (files[0].read_bytes(), file.getvalue()):
        drop(browser, data, "image/png", "a.png", "[data-drop=images]")
    wait_until(lambda: browser["images.length"] == 2)
    assert browser["made.map(bitmap => bitmap.width)"] == [0, 0]  # closed


def test_too_many_or_too_large_images_are_told_before_they_are_sent(browser, model, files):
    with serving(model, max_images=2, max_bytes=100_000) as (port, _):
        opened(browser, port)
        browser.choose("[data-choose=images]", *files)
        wait_until(lambda: browser["images.length"] == 3)
        browser.click("#ask")
        wait_until(lambda: answered(browser))
        assert browser["$('error').textContent"] == "There are 3 images, the server takes 2: delete some."
        browser.click('[aria-label="delete image 3 of the question"]')
        browser["images[0].url += ' '.repeat(100000), 0"]
        browser.click("#ask")
        wait_until(lambda: answered(browser))
        assert browser["$('error').textContent"] == (
            "The images have 0.1 MB together, the server takes 0.1 MB: delete some."
        )
        assert metric(port, "mm1_requests_total") == 0
    assert not browser.complaints


def test_what_a_proxy_answers_is_told_in_plain_words(page):
    browser, _ = page
    for status in (200, 502):
        browser[
            f"""window.fetch = async () => new Response("<html>oops</html>", {{status: {status}, statusText: "Gone",
            headers: {{"content-type": "text/html"}}}}), 0"""
        ]
        browser["$('question').value = 'one', 0"]
        browser.click("#ask")
        wait_until(lambda: answered(browser))
        assert browser["$('error').textContent"] == f"The answer was {status} Gone, and not the server's."


def test_a_letter_writes_no_image_and_draws_none_anew(page, files):
    browser, _ = page
    browser.choose("[data-choose=shots]", *files[:2])
    wait_until(lambda: len(browser[SHOTS]) == 2)
    browser["saveNow()"]
    browser[
        """window.written = [], window.put = IDBObjectStore.prototype.put,
        IDBObjectStore.prototype.put = function (...of) { written.push(this.name); return put.apply(this, of); },
        window.first = document.querySelector("#shots img"), 0"""
    ]
    browser.type("#question", "how many?")
    browser["saveNow()"]
    assert set(browser["written"]) == {"page"}
    browser.click('[aria-label="move shot 1 down"]')
    assert browser["first === document.querySelectorAll('#shots img')[1]"]
    browser.click('[aria-label="delete shot 1"]')
    browser["saveNow()"]
    assert (
        browser[
            """database.then(d => new Promise(done => {
        d.transaction("images").objectStore("images").count().onsuccess = event => done(event.target.result); }))"""
        ]
        == 1
    )


def test_an_example_is_asked_with_two_clicks(page, model):
    browser, _ = page
    browser.click("#example")
    assert browser["document.activeElement.id"] == "ask"
    browser.click("#ask")
    wait_until(lambda: answered(browser))
    assert browser["$('error').textContent"] == ""
    first, second, asked = (decode(read_image(url, None)) for url in browser["[...shots, ...images].map(i => i.url)"])
    prompt = ["quiz\n", first, "question: how many eights? answer: three\n", second,
              "question: how many twos? answer: two\n", asked, "question: how many fives? answer:"]  # fmt: skip
    assert browser["$('answer').textContent"] == run_alone(model, prompt, 64, stop="\n").text


def test_a_shot_without_an_answer_is_marked_and_not_sent(page, files):
    browser, port = page
    browser.click("#ask")
    assert "question" in browser["$('error').textContent"]
    browser.choose("[data-choose=shots]", *files[:2])
    wait_until(lambda: len(browser[SHOTS]) == 2)
    browser.type(shot(browser, 1, 2), "one")
    browser.type("#question", "how many?")
    browser.click("#ask")
    assert "no answer" in browser["$('error').textContent"]
    assert browser["[...document.querySelectorAll('#shots .bad')].map(e => e.textContent)"] == [
        "", "This shot has no answer."]  # fmt: skip
    assert browser["document.activeElement.getAttribute('aria-label')"] == "answer of shot 2"
    assert browser["document.activeElement.getAttribute('aria-invalid')"] == "true"
    assert metric(port, "mm1_requests_total") == 0
    browser("Input.insertText", text="two")
    assert browser["document.querySelector('#shots .wrong')"] is None
    browser.click("#ask")
    wait_until(lambda: answered(browser))
    assert browser["$('answer').textContent"]


def test_an_error_about_an_image_stands_at_it(page, files):
    browser, _ = page
    browser.click("#example")
    browser["images.unshift({url: 'data:image/png;base64,AAAA'}), draw()"]
    browser.click("#ask")
    wait_until(lambda: answered(browser))
    errors = browser["[...document.querySelectorAll('#images .bad, #shots .bad')].map(e => e.textContent)"]
    assert "not an image" in errors[0]
    assert errors[1:] == ["", "", ""]
    assert "marked" in browser["$('error').textContent"]
    browser.complaints.clear()  # of the image, and of the 400


def test_what_is_filled_in_is_kept_over_a_reload_and_can_be_cleared(page, files):
    browser, port = page
    browser.choose("[data-choose=shots]", *files[:2])
    wait_until(lambda: len(browser[SHOTS]) == 2)
    kept = browser[SHOTS]
    browser.type(shot(browser, 2, 2), "two")
    browser.type("#question", "how many?")
    browser.type("#key", "secret")
    browser["saveNow()"]
    opened(browser, port)
    wait_until(lambda: browser[SHOTS] == kept)
    assert browser["[$('question').value, shots[1].answer, $('key').value]"] == ["how many?", "two", ""]
    browser.click("#clear")
    assert browser["[shots.length, images.length, $('question').value]"] == [0, 0, ""]
    browser.click("#undo")
    assert browser[SHOTS] == kept
    browser.click("#clear")
    browser["saveNow()"]
    opened(browser, port)
    browser["restore()"]
    assert browser["[shots.length, $('question').value]"] == [0, ""]


def test_on_a_phone_ask_stands_below_the_question_and_the_answer_is_seen(page, files):
    browser, _ = page
    browser("Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=1, mobile=True)
    browser.choose("[data-choose=shots]", *files)
    browser.choose("[data-choose=shots]", *files)
    wait_until(lambda: len(browser[SHOTS]) == 6)
    box = "$('{}').getBoundingClientRect()"
    browser["scrollTo(0, 0), shots.forEach(shot => { shot.answer = 'one'; }), draw()"]
    question, ask = (browser[f"[{box.format(id)}.top, {box.format(id)}.bottom]"] for id in ("question", "ask"))
    assert 0 < question[0] < question[1] < ask[0] < ask[1] < 844
    browser["$('question').value = 'one', $('ask').click()"]
    wait_until(lambda: answered(browser))
    assert 0 <= browser[f"{box.format('answer')}.top"] < 844
    assert browser["document.documentElement.scrollWidth"] == 390
    browser("Emulation.clearDeviceMetricsOverride")


def test_every_control_has_a_name_and_is_reached_by_keys(page, files):
    browser, _ = page
    browser.click("#example")
    nodes = [node for node in browser("Accessibility.getFullAXTree")["nodes"] if not node["ignored"]]
    roles = ("button", "textbox", "checkbox", "spinbutton", "image")
    controls = [node for node in nodes if node["role"]["value"] in roles]
    assert len(controls) > 20
    assert all(node["name"]["value"].strip() for node in controls)
    browser["$('question').focus()"]
    reached = set()
    for _ in range(40):
        browser.key("Tab", 9)
        reached.add(browser["document.activeElement.id || document.activeElement.getAttribute('aria-label')"])
    assert {"ask", "tokens", "line", "key", "example", "clear", "delete shot 2", "answer of shot 1"} <= reached


def test_stop_ends_the_answer_on_the_server_too(browser, model):
    with serving(model) as (port, service):
        slow_steps(service.engine.engine, 0.01)  # 7,000 tokens last 70 seconds; without it an answer ends in two
        opened(browser, port)
        browser["$('tokens').value = 7000, $('line').checked = false, 0"]
        for stop in (lambda: browser.click("#stop"), lambda: browser.key("Escape", 27)):
            browser["$('question').value = '', 0"]
            browser.type("#question", "one")
            browser.key("Enter", 13, modifiers=2)
            wait_until(lambda: browser["$('answer').textContent.length"] > 10)
            assert health(port)["running"] == 1
            stop()
            wait_until(lambda: answered(browser))
            assert browser["$('status').textContent"] == "stopped"
            wait_until(lambda: is_idle(port))
        assert http_request(port, "GET", "/metrics")[0] == 200
    assert not browser.complaints


def test_a_long_answer_is_shown_as_fast_as_it_comes(page):
    browser, port = page
    browser["$('tokens').value = 7000, $('line').checked = false, 0"]
    browser.type("#question", "one")
    begun = time.monotonic()
    browser.click("#ask")
    wait_until(lambda: is_idle(port) and metric(port, "mm1_requests_total") == 1)
    served = time.monotonic() - begun
    wait_until(lambda: answered(browser), 10 + 3 * served)  # it took thirty times as long with a layout for each token
    assert browser["$('status').textContent"].startswith("2 + 7000 tokens")
    assert browser["$('answer').textContent.length"] > 7000
    assert browser["$('answer').childNodes.length"] == 1


def test_stop_works_on_an_answer_that_has_arrived_but_is_not_shown_yet(page):
    browser, port = page
    browser["$('tokens').value = 2000, $('line').checked = false, 0"]
    slow = "t => { const end = performance.now() + 20; while (performance.now() < end); return parse(t); }"
    browser[f"(parse => {{ JSON.parse = {slow}; }})(JSON.parse), 0"]  # a page that takes 40 seconds for 2,000 events
    browser.type("#question", "one")
    browser.click("#ask")
    wait_until(lambda: metric(port, "mm1_requests_total") == 1 and is_idle(port))
    browser.click("#stop")
    wait_until(lambda: answered(browser), 20)
    assert browser["$('status').textContent"] == "stopped"


def test_errors_are_one_line_and_the_key_is_sent(browser, model):
    with serving(model, key="sesame") as (port, _):
        opened(browser, port)
        browser.type("#question", "one")
        browser.click("#ask")
        wait_until(lambda: answered(browser))
        assert browser["$('error').textContent"] == "wrong or missing API key"
        assert browser["document.activeElement.id"] == "key"
        assert browser["$('error').getBoundingClientRect().height"] < 40
        browser.type("#key", "sesame")
        browser.click("#ask")
        wait_until(lambda: answered(browser))
        assert browser["$('error').textContent"] == ""
        assert browser["$('answer').textContent"]
    browser.complaints.clear()  # of the 401
    browser.click("#ask")
    wait_until(lambda: answered(browser))
    assert browser["$('error').textContent"] == "The server does not answer."


def test_an_error_in_the_middle_of_an_answer_is_shown_below_it(browser, model):
    with serving(model) as (port, service):
        opened(browser, port)
        fail_after(20, service.engine.engine)
        browser.type("#question", "which")
        browser.click("#ask")
        wait_until(lambda: answered(browser))
        assert browser["$('error').textContent"].startswith("internal error")
        assert browser["$('answer').textContent"]
    assert not browser.complaints


def test_nothing_but_itself_runs_in_it(model):
    with serving(model) as (port, _):
        _, headers, body = http_request(port, "GET", "/")
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert b"http://" not in body
    assert b"https://" not in body
    assert body.count(b"\n") < 550
