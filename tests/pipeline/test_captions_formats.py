import itertools
import json
import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lipprep.pipeline.captions.aligners import UnknownShape, parse_json
from lipprep.pipeline.captions.read import SUFFIXES, read_timings
from lipprep.pipeline.captions.subtitles import parse_srt, parse_vtt, stamp
from lipprep.pipeline.captions.tables import parse_align, parse_ctm
from lipprep.pipeline.captions.textgrid import parse_textgrid
from lipprep.pipeline.captions.timing import spread
from lipprep.pipeline.captions.words import normalise


def plain(timings) -> list[tuple]:
    return [(t.word, t.start, t.end) for t in timings]


# As automatic captions come: a line is spoken, stands for 10 ms, and stays while the next one is.
AUTOMATIC = """WEBVTT
Kind: captions
Language: en

00:00:00.160 --> 00:00:01.990 align:start position:0%
\x20
good<00:00:00.480><c> evening</c><00:00:01.040><c> Tom&#39;s</c>

00:00:01.990 --> 00:00:02.000 align:start position:0%
good evening Tom&#39;s
\x20

00:00:02.000 --> 00:00:03.190 align:start position:0%
good evening Tom&#39;s
here<00:00:02.500><c.colorE5E5E5> now</c>

00:00:03.190 --> 00:00:03.200 align:start position:0%
here now
\x20

00:00:03.200 --> 00:00:04.000 align:start position:0%
here now
now

00:00:04.000 --> 00:00:06.000 align:start position:0%
now
[heavy music]
"""


def test_automatic_captions_count_rolling_lines_once():
    found = parse_vtt(AUTOMATIC)
    assert plain(found) == [
        ("good", 0.16, 0.48), ("evening", 0.48, 1.04), ("Tom's", 1.04, 1.99), ("here", 2.0, 2.5), ("now", 2.5, 3.19),
        ("now", 3.2, 4.0), ("[heavy music]", 4.0, 6.0),
    ]  # fmt: skip
    assert not any(t.rough for t in found)


def test_a_line_that_stands_on_does_not_make_its_last_word_longer():
    text = "WEBVTT\n\n00:01.000 --> 00:05.000\none<00:01.400>two\n\n00:01.900 --> 00:06.000\nthree<00:02.200>four\n"
    assert plain(parse_vtt(text)) == [("one", 1, 1.4), ("two", 1.4, 1.9), ("three", 1.9, 2.2), ("four", 2.2, 6)]


def test_plain_webvtt_is_spread_by_letters_and_rough():
    text = (
        "WEBVTT - made by hand\n\nNOTE not said\n\nSTYLE\n::cue { color: red }\n\nintro\n"
        "00:01.000 --> 00:03.000 line:0\n<v Ann>It is <i>raining</i> &amp; cold</v>\n\n"
        "00:03.000 --> 00:05.000\nagain\n"
    )
    found = parse_vtt(text)
    assert [t.word for t in found] == ["It", "is", "raining", "cold", "again"] and all(t.rough for t in found)
    assert [round(t.end, 3) for t in found] == [1.267, 1.533, 2.467, 3.0, 5.0]


def test_srt_with_and_without_blank_lines():
    text = (
        "1\n00:00:01,000 --> 00:00:02,000\n<i>Well,</i>\n\nthen\n\n2\n00:00:02,500 --> 00:00:03,000\n{\\an8}go\n3\n"
        "00:00:04,000 --> 00:00:05,000\n1999\n"
    )
    found = parse_srt(text)
    assert [t.word for t in found] == ["Well,", "then", "go", "1999"] and all(t.rough for t in found)
    assert plain(found)[2:] == [("go", 2.5, 3.0), ("1999", 4.0, 5.0)]


LONG = '''File type = "ooTextFile"
Object class = "TextGrid"

xmin = 0
xmax = 1.5
tiers? <exists>
size = 3
item []:
    item [1]:
        class = "IntervalTier"
        name = "phones"
        xmin = 0
        xmax = 1.5
        intervals: size = 1
        intervals [1]:
            xmin = 0
            xmax = 1.5
            text = "AA1"
    item [2]:
        class = "TextTier"
        name = "clicks"
        xmin = 0
        xmax = 1.5
        points: size = 1
        points [1]:
            number = 0.7
            mark = "5"
    item [3]:
        class = "IntervalTier"
        name = "words"
        xmin = 0
        xmax = 1.5
        intervals: size = 3
        intervals [1]:
            xmin = 0
            xmax = 0.25
            text = ""
        intervals [2]:
            xmin = 0.25
            xmax = 1 ! a comment, "not a text"
            text = "say ""hi"""
        intervals [3]:
            xmin = 1
            xmax = 1.5
            text = "Æsir!"
'''
SHORT = """File type = "ooTextFile"
"TextGrid"

0
1.5
<exists>
1
"IntervalTier"
"speech"
0
1.5
2
0
0.5
"one"
0.5
1.5
"two"
"""


def test_textgrids_long_and_short():
    assert plain(parse_textgrid(LONG)) == [
        ("", 0.0, 0.25), ("say", 0.25, 0.7), ('"hi"', 0.7, 1.0), ("Æsir!", 1.0, 1.5)
    ]  # fmt: skip
    assert [t.rough for t in parse_textgrid(LONG)] == [False, True, True, False]
    assert plain(parse_textgrid(LONG, "phones")) == [("AA1", 0.0, 1.5)]
    assert plain(parse_textgrid(SHORT)) == [("one", 0.0, 0.5), ("two", 0.5, 1.5)]


def test_align_and_ctm():
    assert plain(parse_align("0 17250 sil\n17250 22500 bin\n")) == [("sil", 0.0, 0.69), ("bin", 0.69, 0.9)]
    found = parse_ctm(";; made by hand\na A 0.5 0.25 so 0.9\nb 1 1.00 0.5 go NA\n\na A 1.0 0.25 well\n")
    assert plain(found["a"]) == [("so", 0.5, 0.75), ("well", 1.0, 1.25)] and plain(found["b"]) == [("go", 1.0, 1.5)]
    assert [t.confidence for t in found["a"]] == [0.9, None] and found["b"][0].confidence is None


TWO = [{"word": " So", "start": 0.5, "end": 0.75, "score": 0.5}, {"word": "2014."}]
JSON = {
    "gentle": {
        "transcript": "So go",
        "words": [
            {"case": "success", "word": "So", "alignedWord": "so", "start": 0.5, "end": 0.75, "phones": []},
            {"case": "not-found-in-audio", "word": "go"},
        ],
    },
    "whisperx": {"segments": [{"start": 0, "end": 2, "text": "So 2014.", "words": TWO}], "word_segments": TWO},
    "word_segments": {"word_segments": TWO},
    "whisper": {"text": "So", "words": [{"word": "So", "start": 0.5, "end": 0.75}, {"word": "2014.", "start": None}]},
    "list": [{"text": "So", "start": 0.5, "end": 0.75, "confidence": 1}],
    "montreal": {"start": 0, "end": 1, "tiers": {
        "phones": {"type": "interval", "entries": [[0.5, 0.75, "AA"]]},
        "words": {"type": "interval", "entries": [[0.5, 0.75, "So"]]},
    }},
    "praat": {"tiers": [{"class": "IntervalTier", "name": "S1 - words", "entries": [[0.5, 0.75, "So"]]}]},
}  # fmt: skip


@pytest.mark.parametrize("name", JSON)
def test_json_is_known_by_its_shape(name):
    found = parse_json(json.dumps(JSON[name]))
    assert (found[0].word.strip(), found[0].start, found[0].end, found[0].rough) == ("So", 0.5, 0.75, False)
    assert all(t.start is None for t in found[1:]) and len(found) == (1 if name in ("list", "montreal", "praat") else 2)
    assert found[0].confidence == {"whisperx": 0.5, "word_segments": 0.5, "list": 1.0}.get(name)


def test_segments_without_words_are_rough():
    found = parse_json(json.dumps({"segments": [{"start": 1, "end": 2, "text": " so go"}, {"words": [], "text": ""}]}))
    assert plain(found) == [("so", 1.0, 1.5), ("go", 1.5, 2.0)] and all(t.rough for t in found)


@pytest.mark.parametrize(
    ("parse", "text", "message"),
    [
        (parse_vtt, "1\n00:00:01.000 --> 00:00:02.000\na\n", "line 1: it does not begin with WEBVTT"),
        (parse_vtt, "WEBVTT\n\n00:00:01.000 --> soon\na\n", "line 3: .* is not of the form"),
        (parse_vtt, "WEBVTT\n\n00:00:01.000 --> 00:00:99.000\na\n", "line 3"),
        (parse_srt, "1\n00:00:03,000 --> 00:00:02,000\na\n", "line 2: .* ends before it starts"),
        (parse_srt, "nothing here", "no line has times"),
        (parse_align, "0 5 sil\n5 x bin\n", "line 2: .* is not `start end word`"),
        (parse_align, "0 5 sil\n-5 9 bin\n", "line 2"),
        (parse_ctm, "a 1 0.5 0.2\n", "line 1"),
        (parse_ctm, "a 1 nan 0.2 b\n", "line 1: 'nan' is no time"),
        (parse_ctm, "a 1 1 inf b\n", "line 1: 'inf' is no time"),
        (parse_ctm, "a 1 1 1 b 7\n", "line 1: '7' is no confidence"),
        (parse_textgrid, LONG.replace('"TextGrid"', '"Pitch"'), "line 2: .*'Pitch'.* is no TextGrid"),
        (parse_textgrid, LONG.replace("oo", "uu"), "line 2: .*'uuTextFile'"),
        (parse_textgrid, LONG.replace("xmax = 0.25", "xmax = later"), "line 3[0-9]: .* is no"),
        (parse_textgrid, LONG[:-20], "it ends too early"),
        (parse_textgrid, SHORT.replace("\n2\n", "\n999999999\n"), "it ends too early"),
        (parse_textgrid, LONG.replace("xmax = 0.25", "xmax = -1"), "'-1' is no time"),
        (lambda text: parse_textgrid(text, "mine"), LONG, "no tier 'mine' .*'phones', 'words'"),
        (parse_json, '{"words": [{"word": "a", "start": 2, "end": 1}]}', r"words\[0\]: 'a' ends at 1 s, before"),
        (parse_json, '{"words": [{"word": "a", "start": 1, "end": 1e400}]}', "it is no JSON"),
        (parse_json, '{"words": [{"word": 5, "start": 1, "end": 2}]}', r"words\[0\]: the word is 5, no text"),
        (parse_json, '{"words": [{"word": "a", "start": true, "end": 2}]}', "True is no time"),
        (parse_json, '{"tiers": {"words": {"entries": [[0, 1, 2]]}}}', "entry 0 is not"),
        (parse_json, "[" * 100_000, "it is no JSON"),
    ],
)
def test_what_is_no_time_is_refused_by_line_or_entry(parse, text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


@pytest.mark.parametrize("text", ["{}", "[]", "3", '{"title": "a talk"}', '{"tiers": {"words": 5}}', '[{"word": 1}]'])
def test_other_json_is_told_apart(text):
    with pytest.raises(UnknownShape, match=r"no shape|no entries"):
        parse_json(text)


@given(st.integers(0, 99 * 3_600_000 - 1), st.sampled_from(".,"))
def test_times_come_back(milliseconds, comma):
    seconds, ms = divmod(milliseconds, 1000)
    text = f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}{comma}{ms:03}"
    assert round(stamp(text) * 1000) == milliseconds
    assert stamp(text[3:]) == pytest.approx(stamp(text) % 3600)


@given(st.text(max_size=60), st.floats(0, 100), st.floats(0, 100))
@example("... - (oh no) go", 1.0, 0.0)
def test_spread_words_fill_their_time_in_order(text, start, length):
    found = spread(text, start, start + length)
    assert not found or (found[0].start, found[-1].end) == (start, start + length)
    assert all(a.end == b.start for a, b in itertools.pairwise(found))
    assert all(t.rough and t.start <= t.end and any(c.isalnum() for c in t.word) for t in found)


WRITTEN = {
    ".vtt": AUTOMATIC, ".srt": "1\n00:00:01,000 --> 00:00:02,000\na b\n", ".textgrid": LONG,
    ".align": "0 17250 sil\n17250 22500 bin\n", ".ctm": "a A 0.5 0.25 so 0.9\n", ".json": json.dumps(JSON["whisperx"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def junk(tmp_path_factory):
    return tmp_path_factory.mktemp("junk")


@given(suffix=st.sampled_from(SUFFIXES), data=st.data())
@settings(max_examples=150, deadline=None)
def test_junk_is_refused_with_a_reason_or_read(junk, suffix, data):
    content = bytearray(WRITTEN[suffix].encode())
    for _ in range(data.draw(st.integers(0, 6))):
        at = data.draw(st.integers(0, len(content)))
        content[at : at + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=6) | st.sampled_from(
            [b"<", b"-->", b'"', b"\n", b"nan", b"1e999", b"-1", b"[", b"{", b"null", b"\xff\xfe", "１".encode()]
        ))  # fmt: skip
    path = junk / f"a{suffix}"
    path.write_bytes(content)
    try:
        found = read_timings(path)
    except ValueError as error:
        assert str(path) in str(error) and str(error).isprintable()
        return
    for timing in (t for words in found.words.values() for t in words):
        assert timing.start is None or 0 <= timing.start <= timing.end < math.inf
        assert normalise(timing.word) != ""


@pytest.mark.parametrize(
    ("encoding", "fallback"), [("utf-8", None), ("utf-8-sig", None), ("utf-16", None), ("cp1252", "cp1252")]
)
def test_encodings(tmp_path, encoding, fallback):
    (tmp_path / "a.TextGrid").write_bytes(LONG.replace("\n", "\r\n").encode(encoding))
    read = read_timings(tmp_path / "a.TextGrid")
    assert read.words[None][-1].word == "Æsir!" and read.fallback == fallback


def test_what_is_no_text_is_refused(tmp_path):
    for content, message in ((b"", "it is empty"), (b"\x81\x8d", "no text"), (LONG.encode("utf-16-le"), "no text")):
        (tmp_path / "a.vtt").write_bytes(content)
        with pytest.raises(ValueError, match=f"a.vtt: .*{message}"):
            read_timings(tmp_path / "a.vtt")


@pytest.mark.parametrize(
    ("word", "label"),
    [
        ("“Don’t”,", "DON'T"), ("well-known…", "WELL-KNOWN"), (">>", None), ("[Music]", None), ("<eps>", None),
        ("SIL", None), ("spn", None), ("", None), ("cafe\u0301.", "CAFÉ"), ("so\u00adon", "SOON"), ("♪la♪", "LA"),
        ("нет!", "НЕТ"), ("\x1b[2J", "2J"), ("x" * 101, None), ("3rd", "3RD"),
    ],
)  # fmt: skip
def test_words_have_one_spelling(word, label):
    assert normalise(word) == label
    assert label is None or normalise(label) == label
