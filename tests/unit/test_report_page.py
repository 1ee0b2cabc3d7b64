"""The comparison page in a real browser, opened from disk: filters, pages, profiles, audio, streams played again, and 10,000 clips.

Pictures of the page are kept in $NIM4_PAGE_PICTURES, or in pytest's folder.
"""

import re
import shutil
from pathlib import Path

import pytest
from made_corpora import run_program
from made_report import EVENTS, GONE, HTML, NUM_CLIPS, make_inputs, options

from nim4.report import clips, page
from nim4.report.clip_audio import NUM_PEAKS, ClipAudio
from nim4.score.decoded import DecodedSet, Hypothesis, Reference

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no browser: apt-get install -y chromium")

CONTRAST = Path(__file__).parent / "page_contrast.js"
PER_PAGE = 20
MANY = 10_000
MOST_NODES = 3_000  # elements of the first view of MANY clips of 3 systems
WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 375, "height": 800}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """13_report of the made inputs; the files of stage 11 and the corpus's audio are gone, since the page needs none of them."""
    made = tmp_path_factory.mktemp("page") / "made"
    with pytest.MonkeyPatch.context() as patch:
        make_inputs(made, patch)
        run_program(patch, "13_report", *options(made))
    shutil.rmtree(made / "11_decode")
    shutil.rmtree(made / "audio")
    return (made / "13_report").rename(tmp_path_factory.mktemp("elsewhere") / "a page")


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A page of MANY clips, each with its own errors."""
    texts = {f"utt-{i:05d}": f"word{i % 7} of the utterance number {i} in which much is said" for i in range(MANY)}
    refs = tuple(Reference(id, "", text, f"s{int(id[4:]) % 50}", 4.0) for id, text in texts.items())

    def system(name, every):
        hyps = {
            id: Hypothesis(id, None, text if i % every else text.replace("word", "sword"), 4.0, 0.1, None)
            for i, (id, text) in enumerate(texts.items())
        }
        return DecodedSet(name, "test", refs, hyps, None, {})

    systems = [system("first", 3), system("second", 5), system("third", 4999)]
    scored = [[clips.score_set(systems, "WER", profile) for profile in ("plain", "raw")]]
    audio = [ClipAudio(f"audio/{i}.flac", [i % 100] * NUM_PEAKS) for i in range(MANY)]
    folder = tmp_path_factory.mktemp("many")
    page.write_page(folder, page.report_of("many", scored, [], {}, []), page.clips_with_audio(scored, audio, {}))
    return folder


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright  # starts a process of its own, so only where there is a browser

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--autoplay-policy=no-user-gesture-required"])
        yield browser
        browser.close()


class Visit:
    """A tab with the page of a folder, and what was asked for and complained of."""

    def __init__(self, tab, folder):
        self.tab, self.asked, self.complaints = tab, [], []
        tab.on("request", lambda request: self.asked.append(request.url))
        tab.on("pageerror", lambda error: self.complaints.append(str(error)))
        tab.on("console", lambda message: self.complaints.append(message.text))
        tab.goto((folder / "index.html").as_uri())

    def choose(self, name, value):
        self.tab.locator(f"#filters [name={name}]").select_option(value)

    def check(self, name, on=True):
        self.tab.get_by_label(name).set_checked(on)

    def wait(self, count):
        """Until the clips are those of a choice: "1 to 20 of 47", or so."""
        self.tab.get_by_role("status").filter(has_text=re.compile(f"^{count}$")).wait_for()

    def ids(self):
        return self.tab.locator(".clip h3").all_inner_texts()

    def clip(self, id):
        return self.tab.locator(".clip", has=self.tab.get_by_role("heading", name=id, exact=True))

    def row(self, id, system):
        return self.clip(id).locator(f"dt:has-text('{system}') + dd").first


@pytest.fixture
def visit(browser):
    """`visit(folder)` opens a page; nothing but its own files may have been asked for, and no script may have failed."""
    contexts, visits = [], []

    def visit(folder, may_fail="", **given):
        contexts.append(browser.new_context(**({"viewport": WIDE} | given)))
        contexts[-1].set_default_timeout(30_000)
        visits.append((Visit(contexts[-1].new_page(), folder), folder, may_fail))
        return visits[-1][0]

    yield visit
    for context in contexts:
        context.close()
    for one, folder, may_fail in visits:
        assert not [address for address in one.asked if not address.startswith(folder.as_uri() + "/")]
        assert not [line for line in one.complaints if not (may_fail and may_fail in line)]


def test_the_first_view(visit, folder, pictures):
    seen = visit(folder)
    seen.wait(f"1 to {PER_PAGE} of {NUM_CLIPS + 2}")
    assert seen.tab.title().endswith("/made: recognisers compared")
    assert len(seen.ids()) == PER_PAGE
    titles = seen.tab.locator("#tables caption").all_inner_texts()
    assert titles == ["test, MER %", "test_noise: nothing is said"]
    assert seen.tab.locator("#tables tbody tr", has_text="streaming").first.locator("svg circle").count() == 1
    files = [address for address in seen.asked if "clips-" in address]
    assert len(files) == 1, "only the clips that are seen are loaded"
    assert not [address for address in seen.asked if "audio" in address]
    seen.tab.screenshot(path=pictures / "report.png", full_page=True)


def test_errors_are_shown_as_struck_and_underlined(visit, folder):
    seen = visit(folder)
    row = seen.row("u00", "offline")
    assert row.locator(".aligned").inner_text() == "总工北京金商行"
    assert (row.locator("del").inner_text(), row.locator("ins").inner_text()) == ("京", "金")
    assert seen.clip("u00").locator("dt", has_text="offline").first.inner_text().split("\n")[-1].endswith("16.7 % (1 of 6)")
    assert seen.row("u01", "offline").locator("del, ins").count() == 0


def test_html_in_a_text_is_shown_as_text(visit, folder):
    seen = visit(folder)
    assert seen.clip("u02").locator(".reference").inner_text() == HTML
    seen.check("Show texts as written")
    seen.tab.locator(".written").first.wait_for()
    assert seen.row("u02", "offline").locator(".written").inner_text() == HTML.replace("img", "svg")
    assert seen.tab.locator("#list img, #list script").count() == 0
    assert seen.tab.evaluate("window.broken") is None


def test_filters(visit, folder):
    seen = visit(folder)
    seen.choose("language", "en")
    seen.wait("1 to 1 of 1")
    assert seen.ids() == ["u03"]
    seen.choose("language", "")
    seen.choose("set", "test_noise")
    seen.wait("1 to 2 of 2")
    assert seen.clip("n2").get_by_text("nothing is said", exact=True).count() == 1
    seen.choose("set", "")
    seen.check("Made up text only")
    seen.wait("1 to 2 of 2")
    assert seen.ids() == ["u05", "n1"]
    seen.choose("system", "offline")
    seen.wait("1 to 1 of 1")
    seen.check("Made up text only", False)
    seen.choose("system", "")
    seen.check("Changed by hotwords only")
    seen.wait("1 to 5 of 5")
    assert seen.ids() == ["u00", "u10", "u20", "u30", "u40"]
    assert seen.row("u10", "offline_hotwords").locator(".hints").inner_text() == "Hotwords: 北京, 上海"
    assert seen.row("u10", "offline_hotwords").locator(".hints mark").inner_text() == "北京"
    seen.choose("language", "en")
    seen.wait("No clip is like that")


def test_orders(visit, folder):
    seen = visit(folder)
    seen.choose("system", "streaming")
    seen.choose("order", "worst")
    seen.tab.locator(".clip h3").first.filter(has_text="n1").wait_for()
    assert seen.ids()[:3] == ["n1", "u05", "u04"]
    seen.choose("system", "offline_hotwords")
    seen.choose("order", "improved")
    seen.wait("1 to 5 of 5")
    assert seen.ids() == ["u00", "u10", "u20", "u30", "u40"]
    seen.choose("system", "streaming")
    seen.choose("order", "worsened")
    seen.wait("1 to 3 of 3")
    assert seen.ids() == ["u04", "u06", "n1"]
    assert "No text: absent" in seen.row("u06", "streaming").inner_text()


def test_pages_by_keys(visit, folder):
    seen = visit(folder)
    seen.wait(f"1 to 20 of {NUM_CLIPS + 2}")
    following = seen.tab.locator(".pager").first.get_by_role("button", name="Next")
    assert seen.tab.locator(".pager").first.get_by_role("button", name="Previous").is_disabled()
    following.focus()
    seen.tab.keyboard.press("Enter")
    seen.wait(f"21 to 40 of {NUM_CLIPS + 2}")
    seen.tab.keyboard.press("Enter")
    seen.wait(f"41 to {NUM_CLIPS + 2} of {NUM_CLIPS + 2}")
    assert seen.ids()[-1] == "n2"
    assert following.is_disabled()


def test_everything_is_reached_by_keys(visit, folder):
    seen = visit(folder)
    seen.wait(".*")
    reached = set()
    for _ in range(40):
        seen.tab.keyboard.press("Tab")
        reached.add(
            seen.tab.evaluate("document.activeElement.name || document.activeElement.tagName + ' ' + document.activeElement.textContent.slice(0, 8)")
        )
    assert {"profile", "set", "language", "system", "order", "hallucinated", "changed", "written", "BUTTON Next"} <= reached
    assert any(name.startswith("AUDIO") for name in reached)
    assert "BUTTON Replay" in reached


def test_profiles_change_rates_and_texts(visit, folder):
    seen = visit(folder)
    assert seen.row("u03", "offline").locator("del").inner_text() == "two"
    first = seen.tab.locator("#tables tbody tr").first
    before = first.inner_text()
    seen.tab.get_by_label("fair").check()
    seen.row("u03", "offline").locator("del").wait_for(state="detached")
    assert first.inner_text() != before
    assert "profile fair" in seen.tab.locator("figcaption").first.inner_text()


def test_audio_plays_and_moves_the_waveform(visit, folder):
    seen = visit(folder)
    audio = seen.clip("u00").locator("audio")
    assert audio.get_attribute("src") == "audio/000000.flac"
    assert audio.get_attribute("preload") == "none"
    audio.evaluate("audio => audio.play()")
    seen.tab.wait_for_function("() => document.querySelector('audio').currentTime > 0.2")
    assert audio.evaluate("audio => audio.duration") == pytest.approx(2.0, abs=0.01)
    seen.tab.wait_for_function("() => parseFloat(document.querySelector('.wave').style.getPropertyValue('--played')) > 0")
    seen.clip("u01").locator(".wave").click()
    seen.tab.wait_for_function("() => document.querySelectorAll('audio')[1].currentTime > 0.9")
    assert audio.evaluate("audio => audio.paused"), "one at a time"


def test_audio_that_is_missing_is_marked_and_the_rest_goes_on(visit, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "page")
    (copy / "audio" / "000001.flac").unlink()
    seen = visit(copy, may_fail="ERR_FILE_NOT_FOUND")
    assert seen.clip(GONE).locator(".mark").inner_text().startswith("No audio: it cannot be read")
    assert seen.clip(GONE).locator("audio").count() == 0
    assert seen.row(GONE, "offline").locator(".aligned").inner_text() == "总工北京商行"
    seen.clip("u01").locator("audio").evaluate("audio => audio.play().catch(() => {})")
    seen.clip("u01").get_by_text("Audio missing: audio/000001.flac cannot be played").wait_for()
    assert seen.row("u01", "offline").locator(".aligned").inner_text() == "总工北京商行"


def test_a_stream_is_played_again(visit, folder, pictures):
    seen = visit(folder)
    seen.tab.get_by_role("button", name="Replay streaming on u00").click()
    replay = seen.clip("u00").locator(".replay")
    for when, text, stays in EVENTS:
        replay.locator("input").fill(f"{when + 0.01:.2f}")
        assert replay.locator(".stream").inner_text() == text
        assert replay.locator(".changing").text_content() == text[stays:]
    seen.clip("u00").screenshot(path=pictures / "report-replay.png")
    replay.locator("input").fill("0.5")
    seen.tab.evaluate("""() => {
        window.texts = new Set();
        new MutationObserver(() => texts.add(document.querySelector(".stream").textContent)).observe(
            document.querySelector(".stream"), { childList: true, subtree: true });
    }""")
    replay.get_by_role("button").click()
    seen.tab.wait_for_function("() => document.querySelector('audio').currentTime > 0.6")
    replay.get_by_role("button", name="Play stream").wait_for()
    assert seen.tab.evaluate("[...texts]") == [text for _, text, _ in EVENTS]


def test_a_stream_without_audio_is_played_by_the_clock(visit, folder):
    seen = visit(folder)
    seen.tab.get_by_role("button", name=f"Replay streaming on {GONE}").click()
    replay = seen.clip(GONE).locator(".replay")
    replay.locator("input").fill("1.6")
    replay.get_by_role("button").click()
    replay.get_by_role("button", name="Play stream").wait_for()
    assert replay.locator(".stream").inner_text() == EVENTS[-1][1]


def test_reported_figures_have_columns_of_their_own(visit, folder, pictures):
    seen = visit(folder)
    seen.tab.locator("#reported summary").click()
    row = seen.tab.locator("#reported tr", has_text="AISHELL-1 test")
    assert row.locator(".reported").all_inner_texts() == ["1.81", "2.41", "1.51", "0.64", "0.81", "0.92", "0.57", "0.60"]
    assert row.locator(".measured").all_inner_texts() == ["-"]
    assert "project page, 2026" in seen.tab.locator("#reported figcaption").first.inner_text()
    seen.tab.locator("#reported").screenshot(path=pictures / "report-reported.png")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_can_be_read(visit, folder, pictures, scheme):
    seen = visit(folder, color_scheme=scheme)
    seen.check("Show texts as written")
    seen.tab.locator(".written").first.wait_for()
    seen.tab.get_by_role("button", name=re.compile("^Replay")).first.click()
    seen.tab.locator("#reported summary").click()
    ratios = seen.tab.evaluate(CONTRAST.read_text(encoding="utf-8"))
    assert len(ratios) > 300
    assert not [(text, ratio) for text, ratio in ratios if ratio < 4.5]
    seen.tab.screenshot(path=pictures / f"report-{scheme}.png")


def test_a_phone_shows_all_of_it_without_scrolling_aside(visit, folder, pictures):
    seen = visit(folder, viewport=PHONE, has_touch=True)
    seen.wait(".*")
    seen.tab.get_by_role("button", name=re.compile("^Replay")).first.click()
    seen.tab.locator("#reported summary").click()
    assert seen.tab.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    seen.tab.locator("#clips").screenshot(path=pictures / "report-phone.png")


def test_data_that_is_missing_is_told(visit, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "page")
    (copy / "data" / "clips-1.js").unlink()
    seen = visit(copy, may_fail="ERR_FILE_NOT_FOUND")
    seen.wait("1 to 20 of .*")
    seen.tab.locator(".pager").first.get_by_role("button", name="Next").click()
    seen.tab.get_by_role("alert").filter(has_text="data/clips-1.js cannot be read: keep the page's whole folder together").wait_for()
    (copy / "data" / "report.js").unlink()
    visit(copy, may_fail="ERR_FILE_NOT_FOUND").tab.get_by_role("alert").filter(has_text="data/report.js cannot be read").wait_for()


def test_ten_thousand_clips(visit, many):
    seen = visit(many)
    seen.wait("1 to 20 of 10000")
    assert seen.tab.evaluate("document.getElementsByTagName('*').length") < MOST_NODES
    assert len([address for address in seen.asked if "/data/" in address]) == 2
    seen.choose("system", "second")
    seen.choose("order", "worst")
    seen.wait("1 to 20 of 2000")
    assert seen.ids()[:3] == ["utt-00000", "utt-00005", "utt-00010"]
    for _ in range(3):
        seen.tab.locator(".pager").first.get_by_role("button", name="Next").click()
    seen.wait("61 to 80 of 2000")
    seen.choose("system", "third")
    seen.wait("1 to 3 of 3")
    assert seen.ids() == ["utt-00000", "utt-04999", "utt-09998"]
    assert seen.tab.evaluate("document.getElementsByTagName('*').length") < MOST_NODES
    assert not [address for address in seen.asked if "audio" in address]


def test_the_page_names_nothing_that_lies_elsewhere():
    for path in page.FOLDER.iterdir():
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.findall(r"(?:https?:|wss?:)?//[\w.-]+\.\w+|\bdata:|@import|url\(|innerHTML|insertAdjacent|eval\(", text), path
