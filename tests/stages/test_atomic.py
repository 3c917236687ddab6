import os
import sys
import threading

import pytest

from lipprep.stages.atomic import replacing, write_text


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a"
    write_text(path, "before")
    with pytest.raises(RuntimeError), replacing(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_text() == "before"
    write_text(path, "after")
    assert path.read_text() == "after" and [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.skipif(sys.platform == "win32", reason="pipes of a name are POSIX's")
def test_a_pipe_or_a_device_takes_what_is_written_and_stays(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(path.read_bytes()))
    reader.start()
    write_text(path, "words")
    reader.join(60)
    assert read == [b"words"] and path.is_fifo() and [p.name for p in tmp_path.iterdir()] == ["pipe"]
