import socket
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from lipprep.train import app
from lipprep.train.app_page import seen_by_network, show
from lipprep.train.augment import eval_batch
from lipprep.train.cli_app import demo_app
from lipprep.train.config import load_recipe
from lipprep.train.predict import load_reader


@pytest.fixture
def installed(monkeypatch):
    """Gradio seems to be there."""
    monkeypatch.setattr(app, "find_spec", lambda name: name)


def test_a_port_in_use_is_told_before_anything_is_loaded(installed):
    with socket.create_server((app.HOST, 0)) as taken:
        port = taken.getsockname()[1]
        done = CliRunner().invoke(demo_app, ["--checkpoint", "none", "--port", str(port)])
    assert done.exit_code == 1
    assert done.stderr.startswith(f"Error: port {port} of 127.0.0.1: in use")
    assert "--port 0" in done.stderr


def test_only_this_machine_is_listened_to(installed):
    with app.claim(0) as listening:
        assert listening.getsockname()[0] == "127.0.0.1"


def test_without_gradio_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(app, "find_spec", lambda name: None)
    done = CliRunner().invoke(demo_app, ["--checkpoint", "none"])
    assert done.exit_code == 1
    assert 'pip install "lipprep[demo]"' in done.stderr


@pytest.mark.parametrize("size", [95, 96])
def test_the_crop_that_is_shown_is_the_one_that_the_network_is_given(size):
    options = load_recipe("compact", ["augment.crop_size=72"]).augment
    mouth_TSS = np.random.default_rng(0).integers(0, 256, (3, size, size), np.uint8)
    seen_TSS = seen_by_network(mouth_TSS, SimpleNamespace(options=options))
    assert seen_TSS.shape == (3, 72, 72)
    given, again = (eval_batch(torch.from_numpy(m)[None], torch.tensor([3]), options) for m in (mouth_TSS, seen_TSS))
    assert torch.equal(given, again)


def test_what_is_sound_of_a_damaged_video_is_shown(trained_run, make_video, face_frames, tmp_path):
    whole = make_video(tmp_path / "whole.mkv", face_frames).read_bytes()
    (tmp_path / "cut.mkv").write_bytes(whole[: len(whole) * 2 // 3])
    page = show(load_reader(trained_run, device="cpu"), tmp_path / "cut.mkv", name="cut.mkv")
    assert "<video src='data:video/mp4;base64," in page and "<h2>cut.mkv</h2>" in page
