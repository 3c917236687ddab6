"""The page that `lipprep report` writes, in a real browser: seen, filtered, linked to, and used without a mouse."""

import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from lipprep.cli import main

pytestmark = pytest.mark.browser
WORDS = ("ABOUT", "<b>&\"'", "שלום")


def run(*arguments: object) -> None:
    result = CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output


@pytest.fixture(scope="session")
def report(tmp_path_factory, make_video, face_frames) -> str:
    """The URL of a report on twelve clips of three words and two speakers; one cannot be read, one shows no face."""
    folder = tmp_path_factory.mktemp("report")
    rows = ["video,word,split,speaker"]
    for n in range(12):
        frames = face_frames[n : n + 12] if n != 7 else [f // 64 for f in face_frames[:12]]
        path = make_video(folder / f"videos/clip{n}.mp4", frames)
        word = WORDS[n % 3].replace('"', '""')
        rows.append(f'{path.name},"{word}",{"test" if n >= 9 else "train"},speaker {n % 2}')
    (folder / "videos/clip5.mp4").write_bytes(b"no video")
    (folder / "clips.csv").write_text("\n".join(rows), encoding="utf-8")
    manifest, places = folder / "m.jsonl", ("-m", folder / "m.jsonl", "-w", folder / "work")
    run("manifest", "csv", folder / "clips.csv", "--root", folder / "videos", "-o", manifest)
    for stage in ("landmarks", "crops"):
        run(stage, *places, "-j", 1, "--max-failures", "100%")
    run("report", *places, "--shards", folder / "none", "-o", folder / "report.html")
    if keep := os.environ.get("LIPPREP_REPORT"):  # to look at it
        Path(keep).write_bytes((folder / "report.html").read_bytes())
    return (folder / "report.html").as_uri()


def visible(page) -> list[str]:
    return page.eval_on_selector_all(".card", "cards => cards.filter(c => c.offsetParent).map(c => c.dataset.key)")


def test_all_pictures_decode_and_all_links_lead_somewhere(page, report):
    page.goto(report)
    page.wait_for_function("[...document.images].every(image => image.complete)")
    widths = page.eval_on_selector_all("main > section img:not([alt=''])", "images => images.map(i => i.naturalWidth)")
    assert len(widths) >= 3 and min(widths) > 0
    assert page.locator(".faults img").count() == 1  # of the video without a face
    sheets = page.evaluate(
        """async () => {
            const found = new Set([...document.querySelectorAll(".strip, .averages .tile")]
                .map(tile => getComputedStyle(tile).backgroundImage.slice(5, -2)));
            const load = async (url) => {
                const image = new Image();
                image.src = url;
                await image.decode();
                return image.naturalWidth;
            };
            return Promise.all([...found].map(load));
        }"""
    )
    assert len(sheets) >= 2 and min(sheets) > 0
    lost = page.eval_on_selector_all(
        "a[href^='#']", "links => links.map(a => a.hash.slice(1)).filter(id => !document.getElementById(id))"
    )
    assert lost == []


def test_filters_narrow_what_is_shown_and_can_be_linked_to(page, report):
    page.goto(report)
    page.get_by_role("link", name="All shown").first.click()
    everything = visible(page)
    assert len(everything) == 12
    page.locator("[name=word]").select_option(WORDS[1])
    page.locator("[name=speaker]").select_option("speaker 0")
    few = visible(page)
    assert sorted(few) == ["clip10", "clip4"]
    linked = page.url
    page.get_by_label("Search").fill("clip4")
    assert visible(page) == ["clip4"] and "1 of 12 clips" in page.locator("#told").inner_text()
    page.get_by_role("button", name="Clear filters").click()
    assert visible(page) == everything
    page.goto("about:blank")
    page.goto(linked)
    assert sorted(visible(page)) == sorted(few)
    page.get_by_label("Search").fill("nothing is called so")
    assert visible(page) == [] and page.locator("#none").is_visible()
    page.goto(report + "#sheet-failed?kind=unreadable")
    page.reload()
    assert visible(page) == ["clip5"]


def test_outliers_words_and_speakers_are_a_click_away(page, report):
    page.goto(report)
    link = page.get_by_role("link", name="Highest jitter")
    link.click()
    assert page.locator("#cards").get_attribute("data-sheet") == "jitter-high"
    values = page.eval_on_selector_all(".card .value", "all => all.map(v => parseFloat(v.textContent))")
    assert values and values == sorted(values, reverse=True)
    page.get_by_role("button", name=f"Average mouth of {WORDS[2]}: its clips").click()
    page.wait_for_function("location.hash.startsWith('#sheet-all?word=')")
    assert set(page.eval_on_selector_all(".card", "c => c.map(x => x.dataset.word)")) == {WORDS[2]}
    page.get_by_role("button", name="Clear filters").click()
    page.get_by_role("link", name="By speaker").click()
    page.wait_for_selector(".group")
    assert page.locator(".group").all_inner_texts() == ["speaker 0", "speaker 1"]


def test_crops_play_on_hover_and_focus_unless_less_motion_is_asked_for(page, report):
    page.goto(report)
    tile = page.locator(".card .strip").first
    playing = "e => e.getAnimations().map(a => a.animationName).join()"
    assert tile.evaluate(playing) == ""
    tile.hover()
    assert tile.evaluate(playing) == "play"
    later = "e => { e.getAnimations()[0].currentTime = 250; return getComputedStyle(e).backgroundPositionX }"
    assert tile.evaluate(later).startswith("-")  # another frame
    page.mouse.move(0, 0)
    page.get_by_role("link", name="Skip the clips").focus()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.matches('.tile')")
    assert page.locator(":focus").evaluate(playing) == "play"
    page.emulate_media(reduced_motion="reduce")
    assert page.locator(":focus").evaluate(playing) == ""
    page.get_by_role("button", name="Play all").click()  # asked for
    assert tile.evaluate(playing) == "play"


def test_the_keyboard_reaches_and_works_everything(page, report):
    page.goto(report)
    page.keyboard.press("Tab")
    assert page.locator(":focus").inner_text() == "Skip to the content"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    page.locator(".card .strip").first.focus()
    key = page.locator(":focus").evaluate("tile => tile.closest('.card').dataset.key")
    page.keyboard.press("Enter")
    detail = page.get_by_role("dialog")
    assert detail.is_visible() and key in detail.inner_text() and "Clip length" in detail.inner_text()
    assert detail.locator(".film .tile").count() == 12
    page.keyboard.press("ArrowRight")
    later = page.locator("#detail-key").inner_text()
    assert later == visible(page)[1] != key
    page.get_by_role("button", name="Previous").click()
    assert page.locator("#detail-key").inner_text() == key and page.locator("#previous").is_disabled()
    page.keyboard.press("Escape")
    assert not detail.is_visible()
    assert page.evaluate("document.activeElement.closest('.card').dataset.key") == key
    page.locator("#h-clips").focus()
    reached = []
    for _ in range(16):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.name"))
    order = ["sheet-suspicious", "sheet-random", "sheet-all", "word", "speaker", "split", "kind", "q", "play", "clear"]
    assert [name for name in reached if name in order] == order
    page.locator("#play").focus()
    page.keyboard.press("Space")
    assert page.locator("#play").get_attribute("aria-pressed") == "true"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_legible_on_a_phone_dark_and_light(page, report, scheme):
    page.set_viewport_size({"width": 360, "height": 740})
    page.emulate_media(color_scheme=scheme)
    page.goto(report)
    for sheet in ("suspicious", "random", "words", "failed"):
        page.evaluate(f"location.hash = 'sheet-{sheet}'")
        page.wait_for_function(f"document.getElementById('cards').dataset.sheet === '{sheet}'")
        assert page.evaluate("document.documentElement.scrollWidth") == 360, sheet
    page.locator(".card .tile").first.click()
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    # WCAG 2.2, 1.4.3: text stands out by 4.5 to 1.
    contrasts = page.evaluate(
        """() => {
            const light = (colour) => {
                const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
                    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
                return 0.2126 * r + 0.7152 * g + 0.0722 * b;
            };
            const ground = light(getComputedStyle(document.body).backgroundColor);
            const names = ["body", ".note", ".key", "a.button", "strong.bad", "main a[href]", ".kicker", "summary"];
            return names.map(name => {
                const text = light(getComputedStyle(document.querySelector(name)).color);
                return [name, (Math.max(text, ground) + 0.05) / (Math.min(text, ground) + 0.05)];
            });
        }"""
    )
    assert [c for c in contrasts if c[1] < 4.5] == []
    assert (page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 22, 22)") == (scheme == "dark")
