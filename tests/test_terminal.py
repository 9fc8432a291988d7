"""Text from outside is printed as it is: not as markup, and without control over the terminal."""

from rich.table import Table
from rich.text import Text

from msd_hf.cli.streaming import AcceptanceStreamer
from msd_hf.terminal import make_console, one_line, printable


def printed(console, *objects, **arguments):
    with console.capture() as capture:
        console.print(*objects, **arguments)
    return capture.get()


def test_brackets_and_colons_are_text():
    text = 'pip install "msd-hf[bench]" [bold]b[/bold] [/b] :smile:'
    assert printed(make_console(width=200), text) == text + "\n"
    table = Table("[/head]")
    table.add_row("[/b]")
    assert "[/head]" in printed(make_console(), table) and "[/b]" in printed(make_console(), table)


def test_control_characters_are_shown_and_do_nothing():
    text = "a\x1b[31m\x9b1m\x07\u202eb\udcff"
    shown = "a␛[31m\\x9b1m"
    console = make_console(width=200, force_terminal=True, color_system="truecolor")
    table = Table("h")
    table.add_row(text)
    for thing in (text, Text(text), table):
        out = printed(console, thing)
        assert shown in out and "\\u202eb\\udcff" in out
        assert not any(character in out for character in ("\x1b[31m", "\x9b", "\x07", "\u202e", "\udcff"))
    assert printed(console, Text("a", style="bold green")) == "\x1b[1;32ma\x1b[0m\n"  # styles of our own still work


def test_ordinary_text_is_not_changed():
    text = "é😀 👩‍🚀 ‏שלום\tx\ny  z"
    assert printable(text) == text
    assert one_line(" a\r\n   b  c\x1b ") == "a b  c␛"


class Letters:
    """A tokenizer whose tokens are code points."""

    def decode(self, tokens, skip_special_tokens):
        return "".join(map(chr, tokens))


def test_a_streamed_answer_cannot_control_the_terminal():
    for coloured in (False, True):
        console = make_console(force_terminal=coloured, color_system="truecolor" if coloured else None, width=80)
        streamer = AcceptanceStreamer(Letters(), console)
        with console.capture() as capture:
            for letter in "a\x1b[2J[/b]":
                streamer._print(letter, accepted=False)
            streamer.end()
        assert capture.get() == "a␛[2J[/b]\n"
