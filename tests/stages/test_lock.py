import subprocess
import sys
from contextlib import ExitStack

import pytest
from traps import POSIX

from lipprep.stages import lock
from lipprep.stages.lock import LOCK, hold, holder_of

HOLDER = """
import sys
from pathlib import Path
from lipprep.stages.lock import hold
with hold(Path(sys.argv[1]), str, says="the other, "):
    print("mine", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_PATIENCE", 0)
    return tmp_path / LOCK


@POSIX
def test_a_lock_is_held_by_a_process_until_it_ends(path):
    other = subprocess.Popen([sys.executable, "-c", HOLDER, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline().strip() == b"mine"
        assert holder_of(path).startswith(f"the other, process {other.pid} on ")
        for shared in (True, False):
            with pytest.raises(ValueError, match="not yours"), hold(path, lambda: "not yours", shared=shared):
                pass
    finally:
        other.kill()
        other.communicate()
    with hold(path, str):
        assert "the other" not in holder_of(path)


@POSIX
def test_who_shares_a_lock_keeps_out_who_would_have_it_alone(path):
    path.touch()
    with ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(hold(path, str, shared=True))
        assert holder_of(path) is None
        with pytest.raises(ValueError, match="shared"), hold(path, lambda: "shared"):
            pass
    with hold(path, str):
        pass
