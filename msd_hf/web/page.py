"""The page itself, of gradio's components."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.utils import logging

from ..errors import MSDError, describe_error
from ..hub.names import public_name
from ..images import read_image
from ..writing.redaction import redact_text
from .markup import escaped, sides_markup, summary_markup, trees_markup
from .questions import asked_question, example_questions
from .race import Frame, RacePair, race


if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.get_logger(__name__)

STYLE = Path(__file__).parent / "page.css"
MOST_CHARACTERS = 4000  # of a question
Views = tuple[str, str, str]  # summary, both sides and the tree, as HTML
_INTRODUCTION = """
# The same answer in less time
A small draft proposes a tree of next tokens; the target checks the whole tree in one forward and keeps the branch that
it would have written itself.
"""
_METHOD = """
**How it is timed.** Both sides run one after the other, each alone on the machine, and then a replay shows both by
their own clocks. A clock counts the whole call: picture, prompt and answer. One answer is one run, so the speedup
varies a little; `msd-hf bench` measures it with repeats. **tau** is the number of tokens that a forward of the target
emits; alone it emits 1.
"""
_LEGEND = (
    '<p class="legend"><span class="drafted">drafted, accepted by the target</span> '
    '<span class="own">the target’s own token</span> <span class="rejected">drafted, not accepted</span></p>'
)


def build_page(pair: RacePair, folder: Path, prompt: str, image: Image | None = None) -> Any:
    """
    Makes the page as a `gradio.Blocks`.

    gradio's `ChatInterface` has one column, and its messages are Markdown, in which tokens cannot be coloured. So the
    page has the input of that interface, and HTML for the two sides.

    Args:
        pair (`RacePair`): who answers.
        folder: an existing folder of temporary files, to which pictures are written.
        prompt, image: what the input holds at first.
    """
    import gradio as gr

    with gr.Blocks(title="msd_hf", analytics_enabled=False) as page:
        gr.Markdown(_INTRODUCTION)
        target, draft = (escaped(public_name(name)[0] or "") for name in pair.names)
        gr.HTML(f'<p class="note">Target: {target}. Draft: {draft}.</p>')
        box = gr.MultimodalTextbox(
            asked_question(folder, "first", prompt, image),
            file_types=["image"],
            sources=["upload"],
            placeholder="A question; add a picture with the clip, or by pasting it",
            show_label=False,
            elem_id="question",
        )
        examples = gr.Examples(example_questions(folder), box, label="Examples", api_visibility="private")
        first = _views(Frame())
        views = [gr.HTML(first[0]), gr.HTML(first[1])]
        gr.HTML(_LEGEND)
        views.append(gr.HTML(first[2], elem_id="tree"))

        def answer(asked: dict[str, Any]) -> Iterator[list[Any]]:
            yield [gr.update(submit_btn=False, stop_btn=True), *first]
            for shown in answer_views(pair, asked):
                yield [gr.skip(), *shown]
            yield [gr.update(submit_btn=True, stop_btn=False), *(gr.skip() for _ in views)]

        # One race at a time: two at once would take time from each other.
        once = {"concurrency_limit": 1, "concurrency_id": "race", "api_visibility": "private"}
        asked = box.submit(answer, box, [box, *views], show_progress="hidden", **once)
        clicked = examples.load_input_event.then(answer, box, [box, *views], show_progress="hidden", **once)
        box.stop(
            lambda: gr.update(submit_btn=True, stop_btn=False),
            outputs=box,
            cancels=[asked, clicked],
            queue=False,
            api_visibility="private",
        )
        gr.Markdown(_METHOD)
    return page


def answer_views(pair: RacePair, asked: dict[str, Any]) -> Iterator[Views]:
    """
    The [`Views`] of the page while a question is answered. An error is shown in place of the summary.

    Args:
        pair (`RacePair`): who answers.
        asked: `{"text": question, "files": [path of the picture]}`.
    """
    try:
        question, files = asked["text"].strip(), asked["files"]
        if not question:
            raise MSDError("Type a question.")
        if len(question) > MOST_CHARACTERS:
            raise MSDError(f"The question has {len(question):,} characters; at most {MOST_CHARACTERS:,} are answered.")
        if len(files) > 1:
            raise MSDError(f"Got {len(files)} pictures: give one, or none.")
        image = read_image(files[0]) if files else None
        for frame in race(pair, question, image):
            yield _views(frame)
    except Exception as error:  # the page lives on
        if not isinstance(error, MSDError):
            logger.error("A question could not be answered.", exc_info=error)
        message = redact_text(describe_error(error))  # visitors need no path of this machine
        empty = _views(Frame())
        yield (f'<p class="summary error">{escaped(message)}</p>', *empty[1:])


def _views(frame: Frame) -> Views:
    return summary_markup(frame), sides_markup(frame), trees_markup(frame)


__all__ = ["STYLE", "answer_views", "build_page"]
