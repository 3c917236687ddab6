import pytest

from lipprep.train.predict import WindowReading
from lipprep.train.subtitles import write_subtitles
from lipprep.train.utterances import Utterance, spans, utterances


def window(start, word, probability=0.9, known=True, length=29):
    return WindowReading(start, start + length, ((word, probability), ("other", 1 - probability)), known)


def test_each_window_answers_for_its_middle():
    assert spans([], fps=25) == []
    assert spans([window(0, "a")], fps=29) == [(0, 1)]
    assert spans([window(0, "a"), window(10, "a"), window(14, "b")], fps=1) == [(0, 19.5), (19.5, 26.5), (26.5, 43)]
    # After a cut, or a stretch without a face.
    assert spans([window(0, "a"), window(29, "a", length=11), window(80, "a")], fps=1) == [(0, 29), (29, 40), (80, 109)]


def test_neighbours_that_agree_are_one_utterance():
    windows = [window(0, "a", 0.6), window(10, "a", 0.8), window(20, "b"), window(30, "c", 0.3, known=False)]
    windows += [window(40, "d", 0.4, known=False), window(100, "a")]
    assert utterances(windows, fps=10) == [
        Utterance("a", 0, 2.95, (("a", 0.8), ("other", pytest.approx(0.2)))),
        Utterance("b", 2.95, 3.95, (("b", 0.9), ("other", pytest.approx(0.1)))),
        Utterance(None, 3.95, 6.9, (("d", 0.4), ("other", 0.6))),
        Utterance("a", 10, 12.9, (("a", 0.9), ("other", pytest.approx(0.1)))),
    ]


def test_subtitles_have_the_words_that_are_known(tmp_path):
    said = [Utterance("a", 0, 1.0004, (("a", 0.9),)), Utterance(None, 1, 2, (("b", 0.1),))]
    said.append(Utterance("é-->", 3599.9996, 3723.5, (("é-->", 0.9),)))
    write_subtitles(said, tmp_path / "s.srt")
    assert (tmp_path / "s.srt").read_text("utf-8").split("\n") == [
        *("1", "00:00:00,000 --> 00:00:01,000", "a", ""),
        *("2", "01:00:00,000 --> 01:02:03,500", "é->", ""),
    ]
    write_subtitles(said[:2], tmp_path / "s.VTT")
    assert (tmp_path / "s.VTT").read_text("utf-8") == "WEBVTT\n\n1\n00:00:00.000 --> 00:00:01.000\na\n"
