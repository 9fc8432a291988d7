"""Serving the page from this machine, without anything from the internet."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import MSDError
from ..images import read_image
from ..serving.sockets import bound_socket
from ..toy import DEMO_IMAGE
from .page import STYLE, build_page
from .race import RacePair, answers


if TYPE_CHECKING:
    from PIL.Image import Image

DEFAULT_HOST = "127.0.0.1"
_LARGEST_PICTURE = "20mb"
_MOST_WAITING = 32  # questions
_WARM_UP_TOKENS = 32


def check_server(host: str, port: int | None) -> None:
    """
    Checks what the page needs. Call it before the models are loaded.

    Raises:
        MSDError: when gradio is not installed, or the address cannot be used.
    """
    if importlib.util.find_spec("gradio") is None:
        raise MSDError('The page needs gradio: pip install "msd-hf[demo]", or leave --web out.')
    try:
        bound_socket(host, port or 0).close()
    except OSError as error:
        place = f"--host {host!r}" if port is None else f"--host {host!r} --port {port}"
        reason = error.strerror or error
        raise MSDError(f"{place} cannot be served from: {reason}. Choose another one.") from error


@contextmanager
def serving(pair: RacePair, host: str, port: int | None, prompt: str, image: Image | None = None) -> Iterator[str]:
    """
    Serves the page inside the block, and yields its address. Uploaded pictures are deleted at the end.

    Args:
        pair (`RacePair`): who answers.
        host, port: where to; without a port the first free one from 7860.
        prompt, image: what the input holds at first.
    """
    # gradio reads these variables when it is imported.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    with tempfile.TemporaryDirectory(prefix="msd-hf-web-", ignore_cleanup_errors=True) as name:
        os.environ["GRADIO_TEMP_DIR"] = name
        import gradio as gr

        pictures = Path(name) / "examples"
        pictures.mkdir()
        page = build_page(pair, pictures, prompt, image)
        page.queue(max_size=_MOST_WAITING)
        try:
            _, address, _ = page.launch(
                server_name=f"[{host}]" if ":" in host else host,  # IPv6
                server_port=port,
                share=False,
                quiet=True,
                prevent_thread_lock=True,
                ssr_mode=False,
                run_history=False,
                enable_monitoring=False,
                footer_links=[],
                max_file_size=_LARGEST_PICTURE,
                theme=gr.themes.Base(primary_hue="green", font=("system-ui", "sans-serif")),
                css_paths=STYLE,
            )
            yield address
        finally:
            page.close(verbose=False)


def warm_up(pair: RacePair) -> None:
    """Answers a question on both sides. First calls are slower, and trees learn how large they may be."""
    short = replace(pair, arguments={**pair.arguments, "max_new_tokens": _WARM_UP_TOKENS})
    for _ in answers(short, "Describe the picture.", read_image(DEMO_IMAGE)):
        pass


__all__ = ["DEFAULT_HOST", "check_server", "serving", "warm_up"]
