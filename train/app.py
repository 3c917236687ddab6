"""The server of `lipprep demo-app`: one page on this machine's own address, and nothing that leaves it.

Gradio makes the page. What it would tell others of is turned off: analytics, its look for a newer version, share
links, its record of earlier runs, fonts from a network. It is launched, not mounted, since it checks the paths of files
only then; before it stands the gate of `app_gate`.
"""

import contextlib
import errno
import os
import socket
import tempfile
import threading
from collections.abc import AsyncIterator
from functools import partial
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lipprep.io.errors import UserError, log_internal_error
from lipprep.stages.untrusted import printable

if TYPE_CHECKING:
    import gradio
    from starlette.applications import Starlette

    from lipprep.train.app_gate import Gate
    from lipprep.train.predict import Reader

HOST = "127.0.0.1"


def claim(port: int) -> socket.socket:
    """Return a socket that listens on `port` of this machine's own address; 0 stands for a free one.

    Raises UserError where the port cannot be had, or Gradio is missing.
    """
    if find_spec("gradio") is None:
        raise UserError('the page needs Gradio, which is missing: pip install "lipprep[demo]"')
    try:
        return socket.create_server((HOST, port))
    except OSError as error:
        raise _unusable(port, error) from error


def _unusable(port: int, error: OSError) -> UserError:
    used = error.errno in (errno.EADDRINUSE, None)  # Gradio gives its own error no number
    reason = "in use, perhaps by a demo-app that still runs" if used else os.strerror(error.errno)
    return UserError(f"port {port} of {HOST}: {reason}. Name another with --port, or take a free one with --port 0")


def serve(reader: "Reader", listening: socket.socket, *, name: str) -> None:
    """Serve the page that reads with `reader`, called `name` there, until Ctrl-C or SIGTERM.

    `listening` has held the port so far, and is closed. Raises UserError where another program takes the port then.
    """
    with tempfile.TemporaryDirectory(prefix="lipprep-demo-") as temporary:
        folder = Path(temporary).resolve()
        _settle(folder)
        import gradio

        from lipprep.train.app_gate import MAX_BYTES, Gate

        gate = Gate(folder)
        page = _page(reader, name, gate)

        @contextlib.asynccontextmanager
        async def gated(app: "Starlette") -> AsyncIterator[None]:
            gate.app, app.middleware_stack = app.middleware_stack, gate  # outermost, before the first request
            yield

        port = listening.getsockname()[1]
        listening.close()  # Gradio opens it anew
        try:
            page.launch(
                app_kwargs={"lifespan": gated, "openapi_url": None},
                server_name=HOST,
                server_port=port,
                prevent_thread_lock=True,
                css=_CSS,
                theme=gradio.themes.Default(
                    primary_hue="blue",
                    neutral_hue="gray",
                    font=["system-ui", "sans-serif"],
                    font_mono=["ui-monospace", "monospace"],
                ),
                max_file_size=MAX_BYTES,
                footer_links=[],
                run_history=False,
                enable_monitoring=False,
                show_error=False,
                ssr_mode=False,
                mcp_server=False,
                pwa=False,
                share=False,
                inline=False,
                quiet=True,
            )
        except OSError as error:
            raise _unusable(port, error) from error
        click.echo(
            f"http://{HOST}:{port} reads videos with {printable(name)}. Only this machine can reach it; Ctrl-C ends it."
        )
        try:
            with contextlib.suppress(KeyboardInterrupt):
                threading.Event().wait()
        finally:
            page.close(verbose=False)


def _settle(folder: Path) -> None:
    """Set what Gradio reads of the environment at its import: `folder` for its files, and nobody who is told of it."""
    for setting in [name for name in os.environ if name.startswith("GRADIO_")]:
        del os.environ[setting]  # they share the page, open folders, and serve under another name
    os.environ |= {"GRADIO_TEMP_DIR": str(folder), "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
    os.environ |= {"NO_PROXY": "*", "no_proxy": "*"}  # it asks itself for its page


def _page(reader: "Reader", name: str, gate: "Gate") -> "gradio.Blocks":
    import gradio

    def read(path: str, name: str | None = None) -> tuple[None, str]:
        from lipprep.train.app_page import problem, show

        name = name or Path(path).name
        try:
            with gate.reading(path) as video:
                return None, show(reader, video, name=name)
        except (UserError, OSError) as error:
            return None, problem(name, str(error).replace(path, "it"))
        except Exception as error:
            log = log_internal_error(error, "lipprep demo-app")
            return None, problem(name, f"a fault in lipprep, not in your video: report it with the traceback in {log}")

    def path_of(payload: "gradio.FileData | None") -> str | None:
        return payload and payload.path

    with gradio.Blocks(title="lipprep", fill_width=True, analytics_enabled=False) as page:
        header = _HEADER.format(words=len(reader.labels), name=escape(printable(name)))
        gradio.HTML(header, apply_default_css=False)
        with gradio.Row():
            with gradio.Column(scale=2, min_width=280):
                with gradio.Tab("File"):
                    file = gradio.File(label="A video of someone speaking", file_types=None, height=180)
                with gradio.Tab("Camera"):
                    camera = gradio.Video(sources=["webcam"], label="Say one word")
            with gradio.Column(scale=5, min_width=280):
                shown = gradio.HTML(_EMPTY, apply_default_css=False)
        # Gradio would leave an empty file of each file, and mirror a recording and cut out its sound with ffmpeg.
        file.preprocess = camera.preprocess = path_of
        one_at_a_time = {"concurrency_id": "reader", "api_visibility": "private"}
        file.upload(read, file, [file, shown], **one_at_a_time)
        recorded = partial(read, name="Your recording")
        camera.stop_recording(recorded, camera, [camera, shown], **one_at_a_time)
    return page


_HEADER = """
<header class='top'><h1>lipprep</h1>
<p>Reads from the lips which of {words} words is spoken, with {name}. A video stays on this machine, and is deleted as
soon as it is read.</p></header>
"""
_EMPTY = "<p class='empty'>Drop a video: the face, what the network sees of it and the words come here.</p>"
_CSS = """
.gradio-container { width: 100%; max-width: 80rem !important; margin: 0 auto !important; }
.top h1 { font-size: 1.6rem; font-weight: 600; margin: 0; }
.top p, .empty, .reading figcaption, .reading caption, .reading dt, .reading thead, .unsure { opacity: 0.75; }
.top p { max-width: 44rem; margin: 0.25rem 0 0; }
.reading { display: grid; grid-template-columns: minmax(0, 21rem) minmax(0, 1fr); gap: 1rem 2rem; }
.reading > h2, .reading > p { grid-column: 1 / -1; margin: 0; overflow-wrap: anywhere; }
.reading h2 { font-size: 1.1rem; font-weight: 600; }
.reading h3 { font-size: 1rem; font-weight: 600; margin: 0 0 0.25rem; }
.reading figure { margin: 0 0 1rem; }
.reading figcaption, .reading caption, .reading dt, .reading thead { font-size: 0.85rem; text-align: left; }
.faces video { display: block; max-width: 100%; max-height: 22rem; border-radius: 6px; }
.mouth { width: 11rem; }
.mouth img { display: block; width: 100%; height: auto; border-radius: 6px; image-rendering: pixelated; }
.face { display: grid; grid-template-columns: 11rem minmax(0, 1fr); gap: 0 1.5rem; align-items: start; }
.face, .face + dl { margin-bottom: 1rem; }
.answer { font-size: 2rem; font-weight: 600; line-height: 1.1; margin: 0 0 0.5rem; overflow-wrap: anywhere; }
.answer small { font-size: 1rem; font-weight: 400; opacity: 0.75; }
.words { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
.words td, .words th { padding: 0.15rem 0.75rem 0.15rem 0; text-align: left; font-weight: 400; white-space: nowrap; }
.words .bar { width: 50%; min-width: 4rem; }
.words .bar span { display: block; height: 0.6rem; min-width: 2px; border-radius: 0 3px 3px 0; background: #3987e5; }
.scrolls { max-height: 26rem; overflow: auto; }
.timeline { grid-column: 1 / -1; overflow-x: auto; }
.timeline img { min-width: 44rem; max-width: 100%; border-radius: 6px; }
.reading dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 0.25rem 1rem; margin: 0; }
.reading dd { margin: 0; }
.dot { display: inline-block; width: 0.7em; height: 0.7em; border-radius: 50%; }
.problem { border-left: 4px solid #d95926; padding-left: 1rem; }
@media (max-width: 70rem) { .reading { grid-template-columns: minmax(0, 1fr); } }
@media (max-width: 36rem) { .face { grid-template-columns: minmax(0, 1fr); } }
"""
