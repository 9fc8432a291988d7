"""The page of `msd-hf demo --web`."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import MSDUsageError
from .next_step import print_next
from .options import console


def serve_page(
    prompt: str,
    image: Path,
    target_name: str | None,
    draft_name: str | None,
    dtype: str | None,
    device: str | None,
    host: str | None,
    port: int | None,
    arguments: Mapping[str, Any],
    seed: int,
) -> None:
    """Serves the page until Ctrl-C. Names, dtype, device, host and port that are `None` have their defaults; the
    question with its picture stands in the input at first; `arguments` and `seed` are those of `generate`."""
    from ..images import read_image
    from ..loading import load_target
    from ..toy import DRAFT_DIR, TARGET_DIR
    from ..web.race import RacePair
    from ..web.server import DEFAULT_HOST, check_server, serving, warm_up
    from .answer import load_draft_and_processor

    names = "the bundled toy LLaVA", "the bundled one"
    if draft_name is not None:
        names = target_name or "", draft_name
    elif target_name is not None:
        raise MSDUsageError("--target needs its draft: give it with --draft.")
    else:
        target_name, draft_name, device = str(TARGET_DIR), str(DRAFT_DIR), device or "cpu"
    # All inputs are checked before the target's weights are loaded, which takes long.
    host, dtype, device = host or DEFAULT_HOST, dtype or "auto", device or "auto"
    check_server(host, port)
    picture = read_image(image)
    target_name, draft, processor = load_draft_and_processor(target_name, draft_name, dtype, device)
    target = load_target(target_name, dtype, device)
    draft = draft.to(device=target.device, dtype=target.dtype)
    pair = RacePair(target, draft, processor, (names[0] or target_name, names[1]), arguments, seed)
    console.print("warming up ...")
    warm_up(pair)
    try:
        with serving(pair, host, port, prompt, picture) as address:
            console.print(f"the page is at {address}\nCtrl-C ends it", soft_wrap=True)
            threading.Event().wait()
    except KeyboardInterrupt:
        console.print("ended")
    print_next("generate", "--target", "TARGET", "--draft", "DRAFT", "--image", "PICTURE", "--prompt", "QUESTION")


__all__ = ["serve_page"]
