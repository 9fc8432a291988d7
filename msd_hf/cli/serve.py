"""The command `msd-hf serve`: an OpenAI-compatible server for a target with its draft."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import MSDError
from .options import Device, Dtype, MaxVisualRows, OptionalTarget, check_finite, console, set_visual_rows


def serve(
    draft: Annotated[str, typer.Option(help="Folder or Hub id of its draft, ours or of the original repository.")],
    target: OptionalTarget = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for a free one.")] = 8000,
    model_name: Annotated[
        str | None, typer.Option(help="Model that requests ask for; default: the target's id or the folder's name.")
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    max_visual_rows: MaxVisualRows = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Length limit of an answer, in tokens, if a request sets none.")
    ] = 1024,
    max_length: Annotated[
        int | None,
        typer.Option(min=2, help="Most tokens of prompt and answer together; default: the target's positions."),
    ] = None,
    max_body: Annotated[int, typer.Option(min=1, help="Largest request, in MiB.")] = 32,
    max_images: Annotated[int, typer.Option(min=0, help="Most pictures of a request.")] = 8,
    max_image_pixels: Annotated[
        int, typer.Option(min=1, help="Most pixels of all pictures of a request together.")
    ] = 32_000_000,
    max_requests: Annotated[int, typer.Option(min=1, help="Most requests at once, running and waiting.")] = 16,
    timeout: Annotated[
        float, typer.Option(min=0.1, callback=check_finite, help="Seconds that a request may take.")
    ] = 300.0,
    remote_images: Annotated[
        bool, typer.Option("--remote-images", help="Fetch pictures from http(s) addresses of requests.")
    ] = False,
    image_folder: Annotated[
        Path | None, typer.Option(help="Read pictures of this folder that requests name as file:// URLs.")
    ] = None,
) -> None:
    """Serve a target with its draft: OpenAI's chat completions and responses, with pictures, streamed or not."""
    from ..serving.installed import check_installed

    check_installed()
    from transformers.utils import logging

    from ..draft.auto import AutoDraft
    from ..hub.names import public_name, target_or_named
    from ..loading import load_config, load_processor, load_target, parse_device, parse_dtype
    from ..prompts import check_chat_template
    from ..serving.app import build_app
    from ..serving.limits import MEBIBYTE, ServingLimits
    from ..serving.pair import ServedPair
    from ..serving.server import log_requests, make_server, open_socket
    from ..target.support import check_pair

    logging.disable_progress_bar()
    # All inputs are checked before the target's weights are loaded, which takes long.
    if image_folder is not None and not image_folder.is_dir():
        raise MSDError(f"There is no image folder {str(image_folder)!r} (--image-folder).")
    limits = ServingLimits(
        max_new_tokens=max_new_tokens,
        max_length=max_length,
        max_body_bytes=max_body * MEBIBYTE,
        max_images=max_images,
        max_image_pixels=max_image_pixels,
        max_requests=max_requests,
        timeout=timeout,
        remote_images=remote_images,
        image_folder=image_folder,
    )
    parse_dtype(dtype)
    parse_device(device)
    socket = open_socket(host, port)
    with socket:
        if target is not None:
            load_config(target)
        loaded_draft = AutoDraft.from_pretrained(draft)
        set_visual_rows(loaded_draft, max_visual_rows)
        if target is None:
            target = target_or_named(None, loaded_draft.config)
            console.print(f"target   {target}, which the draft names", soft_wrap=True)
        check_pair(load_config(target), loaded_draft.config)
        processor = load_processor(target)
        check_chat_template(processor)
        loaded = load_target(target, dtype, device)
        loaded_draft = loaded_draft.to(device=loaded.device, dtype=loaded.dtype)
        name = model_name or public_name(target)[0] or "target"
        app = build_app(ServedPair(name, loaded, processor, loaded_draft), limits)
        log_requests(lambda line: console.print(line, soft_wrap=True))
        socket.listen()  # requests wait from here on, and are refused no more
        address = f"http://{f'[{host}]' if ':' in host else host}:{socket.getsockname()[1]}"
        console.print(f"model    {name}\nserving  {address}/v1 (Ctrl-C ends it)\nask      ", end="", soft_wrap=True)
        console.print(f"transformers chat {name} {address}", soft_wrap=True)
        make_server(app).run(sockets=[socket])


__all__ = ["serve"]
