"""The page of `msd-hf demo --web`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import MSDUsageError
from .next_step import print_next
from .options import console


_OWN_ADDRESSES = ("127.0.0.1", "localhost", "::1")


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

    is_bundled = draft_name is None
    if draft_name is None:
        if target_name is not None:
            raise MSDUsageError("--target needs its draft: give it with --draft.")
        target_name, draft_name, device = str(TARGET_DIR), str(DRAFT_DIR), device or "cpu"
    # All inputs are checked before the target's weights are loaded, which takes long.
    host, dtype, device = host or DEFAULT_HOST, dtype or "auto", device or "auto"
    check_server(host, port)
    picture = read_image(image)
    target_name, draft, processor = load_draft_and_processor(target_name, draft_name, dtype, device)
    target = load_target(target_name, dtype, device)
    draft = draft.to(device=target.device, dtype=target.dtype)
    names = ("the bundled toy LLaVA", "the bundled one") if is_bundled else (target_name, draft_name)
    pair = RacePair(target, draft, processor, names, arguments, seed)
    console.print("warming up ...")
    warm_up(pair)
    try:
        with serving(pair, host, port, prompt, picture) as address:
            if host not in _OWN_ADDRESSES:
                console.print(f"everyone who can reach {host} may ask questions", soft_wrap=True)
            console.print(f"the page is at {address}\nCtrl-C ends it", soft_wrap=True)
            while True:
                time.sleep(1)
    except KeyboardInterrupt:
        console.print("ended")
    print_next("generate", "--target", "TARGET", "--draft", "DRAFT", "--image", "PICTURE", "--prompt", "QUESTION")


__all__ = ["serve_page"]
