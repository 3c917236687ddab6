"""A record is what was written, or it is none."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from record_lines import failed, header, sound

from lipprep.pipeline.records import commit, read_entries, read_header, record_path
from lipprep.stages.shard.writer import TarWriter

ENTRIES = [
    sound("a", parts={"decode": 0.5}),
    failed("b", parts={"decode": 0.25}),
]


@pytest.fixture(scope="module")
def committed(tmp_path_factory):
    """A tar with its record, and what the record's file and header are."""
    path = tmp_path_factory.mktemp("records") / "train-00000.tar"
    with TarWriter(path) as tar:
        tar.add("a.json", b"{}")
        tar.close()
        commit(tar, header(parts={"write": 0.125}), ENTRIES)
    return path, record_path(path).read_bytes(), read_header(path)


@given(data=st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_changed_record_is_none(data, committed):
    path, content, about = committed
    assert about["counts"] == {"no_face": 1, "ok": 1} and about["parts"] == {"decode": 0.75, "write": 0.125}
    at = data.draw(st.integers(0, len(content)))
    changed = content[:at] + data.draw(st.binary(max_size=4)) + content[at + data.draw(st.integers(0, 9)) :]
    record_path(path).write_bytes(changed)
    if changed == content:
        assert read_header(path) == about and read_entries(path) == ENTRIES
    else:
        assert read_entries(path) == []
        # The lines below the header are not read for it.
        assert read_header(path) in ((None, about) if len(changed) == len(content) else (None,))


@given(content=st.binary(max_size=80) | st.sampled_from([b"[" * 10**5, b"{}", b"[]", b"3", b'{"check": 1e999}']))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_anything_else_is_none(content, committed):
    path, _, _ = committed
    record_path(path).write_bytes(content + b"\n")
    assert read_header(path) is None and read_entries(path) == []
