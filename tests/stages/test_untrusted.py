import pytest
from hypothesis import given
from hypothesis import strategies as st

from lipprep.stages.untrusted import check_file, check_yaml, is_file, printable, read_text


@given(st.text() | st.binary().map(lambda b: b.decode(errors="surrogateescape")))
def test_anything_becomes_one_line_that_can_be_printed(text):
    shown = printable(text)
    assert shown.isprintable() and shown.encode().decode() == shown
    assert shown == text or not text.isprintable()


def test_plain_names_stay_as_they_are():
    assert printable("dir/é 口 %s.mp4") == "dir/é 口 %s.mp4"
    assert printable("a\x1b[2J\nb\u202e\udcff") == "a\\x1b[2J\\nb\\u202e\\udcff"


def test_files_are_looked_at_before_they_are_opened(tmp_path):
    path = tmp_path / "words.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\n")
    assert is_file(path) and check_file(path, "list", limit=12) == path
    assert read_text(path, "list", limit=12) == "one\ntwo\n"
    with pytest.raises(ValueError, match=r"the list .*words\.txt has 12 bytes, at most 11 are read"):
        read_text(path, "list", limit=11)
    path.write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"words\.txt is no UTF-8 text"):
        read_text(path, "list", limit=12)
    for name in ("absent", "n" * 300, "a\0b", "\ud800"):
        assert not is_file(tmp_path / name)
        with pytest.raises(ValueError, match="there is no list"):
            check_file(tmp_path / name, "list")
    assert not is_file(tmp_path)
    with pytest.raises(ValueError, match="no file but a folder"):
        check_file(tmp_path, "list")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &x [1]\nb: *x\n", r"alias \*x"),
        ("<<: *x\n", "alias"),
        ("a: ${oc.env:HOME}", "write the value itself"),
        ("${a}: 1", "write the value itself"),
        ("[" * 21 + "]" * 21, "nested more than 20 deep"),
    ],
)
def test_yaml_that_is_more_than_it_seems(text, message):
    with pytest.raises(ValueError, match=message):
        check_yaml(text)


def test_plain_yaml_is_fine():
    check_yaml("detector: mesh\nbox: [1, 2, 3, 4]\nmean_face: null\n")
    check_yaml("")
