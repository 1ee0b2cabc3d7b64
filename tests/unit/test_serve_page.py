"""The web page in a real browser, at a real server: what is seen, read out, reached by keys, downloaded, and told when something is wrong.

Pictures of the page are kept in $NIM4_PAGE_PICTURES, or in pytest's folder.
"""

import json
import re
import shutil
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import soundfile
import torch
from running_server import RunningServer, as_float, pcm, wait_for
from spoken_clips import join, read_clips

from nim4.corpus.hotword_list import ListReport, Name, make_keys
from nim4.decode.hotword import HotwordIndex
from nim4.decode.streaming import Recogniser
from nim4.model.asr import load_speech_llm

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no browser: apt-get install -y chromium")

HOTWORDS = ["北京", "上海"]
NOISE = pcm(2.0)  # random models write much about it, the detector of speech hears nothing in it
LONG = pcm(12.0, seed=1)
NUM_CLIPS = 3
CONTRAST = Path(__file__).parent / "page_contrast.js"


def final_of(model, samples, hotwords=(), index=None):
    session = Recogniser(model, hotwords=index).session(hotwords)
    session.append(as_float(samples))
    return session.finalize()


def speech():
    """Clips with pauses, (N,) float32."""
    return join(read_clips(NUM_CLIPS), 1.2)


@pytest.fixture(scope="module")
def audio(tmp_path_factory):
    """A folder with noise.wav, long.wav, speech.wav, which has pauses, and none.txt, which is no audio."""
    folder = tmp_path_factory.mktemp("audio")
    for name, samples in (("noise", NOISE), ("long", LONG), ("speech", speech())):
        soundfile.write(folder / f"{name}.wav", samples, 16_000, subtype="PCM_16")
    (folder / "none.txt").write_text("no audio")
    return folder


@pytest.fixture(scope="module")
def browser(audio):
    from playwright.sync_api import sync_playwright  # starts a process of its own, so only where there is a browser

    microphone = f"--use-file-for-fake-audio-capture={audio / 'speech.wav'}%noloop"
    with sync_playwright() as playwright:
        options = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream", microphone]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


class Page:
    """A tab with the page of a server, and what people do there."""

    def __init__(self, tab, server, audio):
        self.tab, self._audio = tab, audio
        self.origins, self.complaints, self.sent = set(), [], []
        tab.on("request", lambda request: self.origins.add(urlsplit(request.url).netloc))
        tab.on("websocket", self._watch)
        tab.on("filechooser", lambda chooser: None)  # so that Playwright catches them from now on: a key would be quicker than its asking
        tab.on("pageerror", lambda error: self.complaints.append(str(error)))
        tab.on("console", lambda message: self.complaints.append(message.text))
        self.address = f"127.0.0.1:{server.port}"
        tab.goto(f"http://{self.address}/")

    def _watch(self, socket):
        self.origins.add(urlsplit(socket.url).netloc)
        socket.on("framesent", lambda data: self.sent.append(data) if isinstance(data, bytes) else None)

    def button(self, name):
        return self.tab.get_by_role("button", name=name, exact=True)

    def wait(self, status):
        self.tab.get_by_role("status").filter(has_text=re.compile(f"^{status}$")).wait_for()

    def open(self, name, pauses=False):
        self.tab.get_by_label("New line at each pause").set_checked(pauses)
        with self.tab.expect_file_chooser() as chooser:
            self.button("Open recording").click()
        chooser.value.set_files(self._audio / name)

    def recognise(self, name="noise.wav"):
        """The row of a recording, when its final text is there."""
        before = self.tab.locator(".utterance").count()
        self.open(name)
        row = self.tab.locator(".utterance").nth(before)
        self.tab.locator(f".utterance[data-state=final] >> nth={before}").wait_for()
        self.wait("Ready")
        return row

    def text(self, row):
        return row.locator(".text").evaluate("element => element.textContent")

    def trouble(self):
        alert = self.tab.get_by_role("alert").filter(has_text=re.compile("."))
        alert.wait_for()
        return alert.inner_text()

    def downloaded(self, press):
        with self.tab.expect_download() as download:
            press()
        assert download.value.suggested_filename.endswith(".jsonl")
        return [json.loads(line) for line in Path(download.value.path()).read_text(encoding="utf-8").splitlines()]

    def num_columns_too_many(self):
        return self.tab.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


@pytest.fixture
def visit(browser, audio):
    """`visit(server)` opens the page of a server; nothing may have been asked of others, and no script may have failed."""
    contexts, pages = [], []

    def visit(server, **options):
        contexts.append(browser.new_context(**({"viewport": {"width": 1280, "height": 860}} | options)))
        contexts[-1].set_default_timeout(30_000)
        pages.append(Page(contexts[-1].new_page(), server, audio))
        return pages[-1]

    yield visit
    for context in contexts:
        context.close()
    for page in pages:
        assert page.origins == {page.address}
        expected = ("status of 401", "WebSocket connection to", "ERR_CONNECTION_REFUSED")  # Chromium's own words about what the tests do
        assert not [line for line in page.complaints if not any(words in line for words in expected)]


def test_a_recording_from_partials_to_the_final_text(server, model, visit, pictures):
    page = visit(server)
    page.wait("Ready")
    page.tab.evaluate("""() => {  // all that is seen and read out, from the first partial to the final text
        window.seen = [];
        const list = document.querySelector("#utterances");
        const look = () => seen.push([list.querySelector(".text")?.textContent, list.querySelector(".utterance")?.dataset.state,
            [...document.querySelectorAll("[aria-live]")].map((element) => element.textContent).join("")]);
        new MutationObserver(look).observe(list, { childList: true, subtree: true });
    }""")
    page.open("noise.wav")
    page.tab.locator(".utterance .changing", has_text=re.compile(".")).wait_for()
    page.tab.screenshot(path=pictures / "partial.png")
    row = page.tab.locator(".utterance[data-state=final]")
    row.wait_for()
    page.wait("Ready")
    final = final_of(model, NOISE).text
    seen = page.tab.evaluate("seen")
    assert len({text for text, state, _ in seen if state == "partial"}) > 1
    assert {announced for _, state, announced in seen if state == "partial"} == {""}, "what can change is not read out"
    assert seen[-1] == [final, "final", final]
    assert page.text(row) == final
    assert row.locator("mark").count()
    assert row.locator(".changing").count() == 0
    assert row.locator(".note").inner_text().startswith("Second pass: ")
    heard = np.frombuffer(b"".join(page.sent), "<i2")
    assert np.abs(heard.astype(int) - NOISE).max() <= 1, "Chromium reads positive samples as if 32767 were 1"
    page.tab.screenshot(path=pictures / "final.png", full_page=True)


def test_the_microphone_and_a_row_for_each_utterance(server, visit, pictures):
    page = visit(server)
    page.wait("Ready")
    page.tab.evaluate("""() => {  // the browser's loudness control would change what is compared below
        const devices = navigator.mediaDevices;
        const open = devices.getUserMedia.bind(devices);
        devices.getUserMedia = ({ audio }) => open({ audio: { ...audio, autoGainControl: false } });
    }""")
    page.button("Microphone").click()
    page.wait("Listening")
    page.tab.locator(".utterance[data-state=final]").nth(NUM_CLIPS - 1).wait_for()
    page.tab.screenshot(path=pictures / "microphone.png")
    page.button("Stop").click()
    page.wait("Ready")
    times = [text.split(":") for text in page.tab.locator(".utterance[data-state=final] time").all_inner_texts()]
    seconds = [60 * int(minutes) + int(seconds) for minutes, seconds in times]
    assert len(seconds) == NUM_CLIPS
    assert seconds == sorted(set(seconds))
    log = page.downloaded(page.button("Download event log").click)
    assert all(0 <= entry["lag_ms"] < 20_000 for entry in log if entry["type"] in ("partial", "final"))
    # on a busy machine the browser loses a block of its made microphone now and then; at another speed next to nothing is alike
    assert likeness(as_float(np.frombuffer(b"".join(page.sent), "<i2")), speech()) > 0.95, "what was said, all of it, at its speed"


def likeness(heard, said):
    """The correlation of two recordings where they fit best, 1 if nothing but loudness and time differ."""
    size = 1 << (len(heard) + len(said)).bit_length()
    together = np.fft.irfft(np.fft.rfft(heard, size).conj() * np.fft.rfft(said, size))
    return np.abs(together).max() / np.linalg.norm(heard) / np.linalg.norm(said)


def test_a_hotword_changes_the_result(server, model, visit):
    page = visit(server)
    page.wait("Ready")
    plain = page.recognise()
    page.tab.get_by_label("Names to listen for").fill("北京, 上海\n北京")
    assert page.tab.get_by_text("2 of at most 10").is_visible()
    hinted = page.recognise()
    assert page.text(plain) == final_of(model, NOISE).text
    assert page.text(hinted) == final_of(model, NOISE, HOTWORDS).text != page.text(plain)
    assert plain.get_by_role("list", name="Hints").count() == 0
    assert hinted.get_by_role("list", name="Hints").get_by_role("listitem").all_inner_texts() == HOTWORDS
    page.tab.get_by_label("Names to listen for").fill("\n".join(map(str, range(11))))
    page.recognise()
    assert page.trouble() == "at most 10 hotwords, not 11: more belong in an index"


def test_names_found_in_an_index(talkative, visit, pictures):
    model, inventory = load_speech_llm(talkative, torch.device("cpu"))
    phones = final_of(model, NOISE).phones
    said = [tuple(inventory.tokens[phone] for phone in phones[start : start + 6]) for start in range(len(phones) - 6)]
    names = [Name(f"名{number}", pronunciations=(syllables,)) for number, syllables in enumerate(said)]
    index = HotwordIndex.build(make_keys(enumerate(names), inventory, ListReport()), inventory)
    found = final_of(model, NOISE, HOTWORDS, index).hints[2:]
    assert found, "names that the model hears in this noise"
    with RunningServer(model, {"names": index}) as server:
        server.service.warm_up()
        page = visit(server)
        page.wait("Ready")
        page.tab.get_by_label("Names to listen for").fill("北京\n上海")
        page.tab.get_by_label("Look up names in").select_option("names")
        row = page.recognise()
        shown = row.get_by_role("list", name="Hints").get_by_role("listitem").all_inner_texts()
        page.tab.screenshot(path=pictures / "hints.png")
    assert shown == [*HOTWORDS, *(f"{name} from the index" for name in found)]


def test_the_event_log(server, visit):
    page = visit(server)
    page.wait("Ready")
    page.tab.get_by_label("Send recordings as fast as the server allows").check()
    row = page.recognise("long.wav")
    log = page.downloaded(page.button("Download event log").click)
    assert sum(entry["num_samples"] for entry in log if entry["type"] == "audio") == len(LONG)
    assert [entry["at_ms"] for entry in log] == sorted(entry["at_ms"] for entry in log)
    partials = [entry for entry in log if entry["type"] == "partial"]
    final = next(entry for entry in log if entry["type"] == "final")
    assert partials
    assert all(entry["lag_ms"] >= 0 and entry["begin_s"] == 0 for entry in [*partials, final])
    assert (final["text"], final["audio_s"]) == (page.text(row), 12.0)
    assert (log[-1]["from"], log[-1]["type"], log[-1]["code"]) == ("page", "closed", 1000)
    assert page.tab.locator("circle.partial").count() == len(partials)
    assert page.tab.locator("path.final").count() == 1
    assert f"{len(partials)} partials: median " in page.tab.locator("#latency-summary").inner_text()
    page.button("Clear all").click()
    assert page.tab.locator(".utterance, circle").count() == 0
    assert page.button("Download event log").get_attribute("aria-disabled") == "true"


def test_a_recording_is_paced(server, visit):
    page = visit(server)
    page.wait("Ready")
    seconds = {}
    for is_fast in (False, True):
        page.tab.get_by_label("Send recordings as fast as the server allows").set_checked(is_fast)
        page.recognise()
        times = [entry["at_ms"] for entry in page.downloaded(page.button("Download event log").click) if entry["type"] == "audio"]
        seconds[is_fast] = (times[-1] - times[0]) / 1000
        page.button("Clear all").click()
    assert seconds[False] > 1.5  # 2 s of audio, 0.2 s ahead of the clock at most
    assert seconds[True] < seconds[False]


LATE_SOCKET = """(delay) => {
  const Socket = WebSocket;
  window.WebSocket = class extends EventTarget {
    readyState = Socket.CONNECTING;
    constructor(...address) {
      super();
      setTimeout(() => {
        const own = (this.own = new Socket(...address));
        own.binaryType = "arraybuffer";
        for (const name of ["open", "message", "close"]) own[`on${name}`] = (event) => ((this.readyState = own.readyState), this[`on${name}`](event));
      }, delay);
    }
    send(data) { this.own.send(data); }
  };
  Object.assign(window.WebSocket, { CONNECTING: Socket.CONNECTING, OPEN: Socket.OPEN });
}"""


def test_a_recording_does_not_run_ahead_while_the_page_connects(model, visit):
    with RunningServer(model, max_ahead_s=4.0) as server:
        page = visit(server)
        page.wait("Ready")
        page.tab.evaluate(LATE_SOCKET, 3000)
        page.tab.get_by_label("Send recordings as fast as the server allows").check()
        page.recognise("long.wav")
        assert page.tab.get_by_role("alert").inner_text() == ""
        assert sum(map(len, page.sent)) == 2 * len(LONG)


def test_the_event_log_has_an_end(server, visit):
    page = visit(server)
    page.wait("Ready")
    first, last, size = page.tab.evaluate("""async () => {
        const { EventLog } = await import(new URL("page/stream.js", document.baseURI));
        const log = new EventLog();
        for (let number = 0; number < 250_000; number++) log.add("page", { type: "audio", number });
        const lines = log.toJsonLines().trimEnd().split("\\n");
        return [JSON.parse(lines[0]), JSON.parse(lines.at(-1)), lines.length];
    }""")
    assert (first["type"], last["number"]) == ("dropped", 249_999)
    assert first["num_messages"] + size - 1 == 250_000
    assert size <= 100_001


def test_a_microphone_that_goes_while_it_is_opened(server, visit):
    page = visit(server)
    page.wait("Ready")
    page.tab.evaluate("""() => {
        const open = navigator.mediaDevices.getUserMedia.bind(navigator.mediaDevices);
        navigator.mediaDevices.getUserMedia = async (wanted) => {
            const stream = await open(wanted);
            stream.getTracks().forEach((track) => track.stop()); // "ended" from now on, and no event says so
            return stream;
        };
    }""")
    page.button("Microphone").click()
    assert page.trouble() == "The microphone is gone."
    page.wait("Ready")
    assert not server.service.streams


def test_everything_is_reached_by_keys(server, visit):
    page = visit(server)
    page.wait("Ready")

    def tab_to(element):
        for _ in range(20):
            page.tab.keyboard.press("Tab")
            focused = page.tab.evaluate("[document.activeElement.id, getComputedStyle(document.activeElement).outlineStyle]")
            if focused[0] == element:
                assert focused[1] == "solid", f"one must see that {element} has the focus"
                return
        pytest.fail(f"{element} is not reached")

    order = []
    for _ in range(8):
        page.tab.keyboard.press("Tab")
        order.append(page.tab.evaluate("document.activeElement.id"))
    assert order == ["microphone", "file", "settings-summary", "hotwords", "pauses", "fast", "download", "clear"]
    tab_to("pauses")
    page.tab.keyboard.press("Space")
    tab_to("file")
    with page.tab.expect_file_chooser() as chooser:
        page.tab.keyboard.press("Enter")
    chooser.value.set_files(page._audio / "long.wav")
    page.wait("Listening")
    tab_to("hotwords")
    page.tab.keyboard.type("北京")
    page.tab.keyboard.press("Shift+Tab")
    page.tab.keyboard.press("Shift+Tab")
    page.tab.locator(".utterance .text").wait_for()
    assert page.tab.evaluate("document.activeElement.textContent") == "Stop"
    page.tab.keyboard.press("Space")
    page.tab.locator(".utterance[data-state=final]").wait_for()
    page.wait("Ready")
    tab_to("download")
    log = page.downloaded(lambda: page.tab.keyboard.press("Enter"))
    assert [entry["session"]["hotwords"] for entry in log if entry["type"] == "session.updated"] == [[], [], ["北京"]]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone(server, visit, pictures, scheme):
    page = visit(server, viewport={"width": 320, "height": 640}, device_scale_factor=2, has_touch=True, color_scheme=scheme)
    page.wait("Ready")
    assert page.num_columns_too_many() == 0
    page.tab.screenshot(path=pictures / f"phone-{scheme}-ready.png")
    page.tab.get_by_role("heading", name="Hotwords").click()
    page.tab.get_by_label("Names to listen for").fill("惠新西街南口" * 8)
    page.open("long.wav")
    page.tab.locator(".utterance .changing", has_text=re.compile(".")).wait_for()
    assert page.num_columns_too_many() == 0
    for element in (page.tab.locator(".utterance .text"), page.button("Stop")):
        assert element.evaluate("element => { const { top, bottom } = element.getBoundingClientRect(); return top >= 0 && bottom <= innerHeight }")
    page.tab.screenshot(path=pictures / f"phone-{scheme}-partial.png")
    page.button("Stop").click()
    page.tab.locator(".utterance[data-state=final]").wait_for()
    page.wait("Ready")
    assert page.num_columns_too_many() == 0
    heights = page.tab.locator("button:visible, select:visible, textarea:visible, summary:visible").evaluate_all(
        "elements => elements.map(element => element.getBoundingClientRect().height)"
    )
    assert min(heights) >= 44, "a finger hits it"
    page.tab.evaluate("scrollTo(0, 0)")
    page.tab.screenshot(path=pictures / f"phone-{scheme}.png", full_page=True)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_and_motion(server, visit, scheme):
    page = visit(server, color_scheme=scheme, reduced_motion="reduce")
    page.wait("Ready")
    page.open("noise.wav")
    page.tab.locator(".utterance .changing", has_text=re.compile(".")).wait_for()
    contrasts = page.tab.evaluate(CONTRAST.read_text(encoding="utf-8"))
    page.tab.locator(".utterance[data-state=final] mark").first.wait_for()
    page.wait("Ready")
    assert page.tab.locator(".text mark").first.evaluate("element => getComputedStyle(element).animationName") == "none"
    contrasts += page.tab.evaluate(CONTRAST.read_text(encoding="utf-8"))
    assert len(contrasts) > 30
    assert not [(text, ratio) for text, ratio in contrasts if ratio < 4.5], "WCAG 2.2, 1.4.3"


def test_a_key_is_asked_for(model, visit, pictures):
    with RunningServer(model, keys=("right",)) as server:
        page = visit(server)
        page.wait("API key needed")
        assert page.tab.evaluate("document.activeElement.id") == "key"
        page.tab.screenshot(path=pictures / "key.png")
        for key, told in (("wrong", "does not accept"), ("not a token: 钥", "cannot be an API key")):
            page.tab.get_by_label("API key").fill(key)
            page.button("Use key").click()
            assert told in page.trouble()
        page.tab.get_by_label("API key").fill("right")
        page.tab.keyboard.press("Enter")
        page.wait("Ready")
        assert page.tab.evaluate("document.activeElement.id") == "microphone"
        assert page.tab.get_by_label("API key").is_hidden()
        assert page.text(page.recognise()) == final_of(model, NOISE).text


def test_what_goes_wrong_is_told_in_a_line(server, visit):
    page = visit(server)
    page.wait("Ready")
    page.open("none.txt")
    assert page.trouble() == "none.txt holds no sound that this browser can read."
    for error, told in (("NotFoundError", "No microphone was found."), ("NotAllowedError", "The microphone was not allowed: allow it")):
        page.tab.evaluate("name => void (navigator.mediaDevices.getUserMedia = () => Promise.reject(new DOMException('', name)))", error)
        page.button("Microphone").click()
        page.tab.get_by_text(told).wait_for()
        page.wait("Ready")
    page.recognise()
    assert page.tab.get_by_role("alert").inner_text() == "", "what is mended is forgotten"


def test_a_stream_that_the_server_ends_or_refuses(model, visit):
    with RunningServer(model, session_s=2.0, max_sessions=1) as server:
        page = visit(server)
        page.wait("Ready")
        page.open("long.wav")
        assert page.trouble() == "A session lasts an hour at most: this one is over."
        assert page.tab.locator(".utterance[data-state=final]").count() == 1
        page.button("Reconnect").click()
        assert page.tab.evaluate("document.activeElement.id") == "microphone"
        page.tab.locator(".utterance[data-state=final]").nth(1).wait_for()
        page.button("Reconnect").wait_for()
        wait_for(lambda: not server.service.streams)
        with server.stream():
            page.button("Reconnect").click()
            assert page.trouble() == "All streams of the server are in use: try again later."


def test_a_server_that_goes_away_and_comes_back(model, visit):
    page = None
    with RunningServer(model, drain_s=0.2) as server:
        page = visit(server)
        page.wait("Ready")
        page.open("long.wav")
        page.tab.locator(".utterance .text").wait_for()
        server.terminate()
        assert page.trouble() == "The server is going away."
    page.button("Reconnect").click()
    page.wait("Not connected")
    assert page.trouble() == "The server cannot be reached."
    with RunningServer(model, port=server.port):
        page.button("Reconnect").click()
        page.wait("Listening")
        page.button("Stop").click()
        page.wait("Ready")
        assert page.tab.get_by_role("alert").inner_text() == ""


def test_the_resampler(server, visit):
    page = visit(server)
    code = """async ([rate, tone, piece]) => {
        const { Resampler } = await import("/page/resampler.js");
        const samples = Float32Array.from({ length: rate / 4 }, (_, i) => Math.sin(2 * Math.PI * tone * i / rate));
        const resampler = new Resampler(rate);
        const output = [];
        for (let start = 0; start < rate / 4; start += piece) output.push(...resampler.push(samples.subarray(start, start + piece)));
        return output;
    }"""
    for rate in (44_100, 48_000, 16_000, 8_000):
        for tone in (100, 1000, 3000):
            output = np.array(page.tab.evaluate(code, [rate, tone, 128]))
            assert 3_900 < len(output) <= 4_000
            expected = np.sin(2 * np.pi * tone * np.arange(len(output)) / 16_000)
            assert np.abs(output - expected)[200:].max() < 2e-3, (rate, tone)
            assert np.allclose(output, page.tab.evaluate(code, [rate, tone, 1777])[: len(output)], atol=1e-6), "in any pieces"
    for tone in (9500, 12_000, 20_000):
        assert np.abs(page.tab.evaluate(code, [48_000, tone, 128]))[200:].max() < 1e-3, "nothing above 8 kHz is heard below"


def test_what_two_texts_have_in_common(server, visit):
    page = visit(server)
    for before, after, expected in (
        ("", "你好", [("changed", "", "你好")]),
        ("你好", "你好", [("same", "你好", "你好")]),
        ("去背景 ok", "去北京 OK。", [("same", "去", "去"), ("changed", "背景", "北京"), ("same", " ", " "), ("changed", "ok", "OK。")]),
        ("play the song", "play that song", [("same", "play ", "play "), ("changed", "the", "that"), ("same", " song", " song")]),
        ("打开app吧", "打开应用吧", [("same", "打开", "打开"), ("changed", "app", "应用"), ("same", "吧", "吧")]),
        ("don't 𠮷", "don't", [("same", "don't", "don't"), ("changed", " 𠮷", "")]),
    ):
        code = "async (texts) => (await import('/page/compare.js')).compare(...texts).map(({ kind, was, now }) => [kind, was, now])"
        assert [tuple(part) for part in page.tab.evaluate(code, [before, after])] == expected
