"""Tables on a terminal: by rich, and in plain columns where there is none."""

import io
import sys

import pytest

from vtp_kernels import terminal

HEAD, BODY = ["method", "FLOPs"], [["FastV [red]", "-40 %"], ["dense", ""]]
MARKDOWN = "| method | FLOPs |\n| --- | ---: |\n| FastV [red] | -40 % |\n| dense |  |"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def screen(monkeypatch):
    """What a call prints on a terminal."""

    def shown(print_it, *table):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", Terminal())
            print_it(*table)
            return sys.stdout.getvalue()

    return shown


def test_on_a_terminal_rich_draws(screen):
    pytest.importorskip("rich")
    table = screen(terminal.show, HEAD, BODY)
    assert "\u2500" in table and "FastV [red]" in table and "---" not in table
    table = screen(terminal.show_markdown, MARKDOWN)
    assert "\u2500" in table and "|" not in table


def test_without_rich_the_table_is_plain(screen, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    assert screen(terminal.show, HEAD, BODY) == f"{terminal.columns(HEAD, BODY)}\n"


def test_in_a_pipe_the_table_is_plain(capsys):
    terminal.show(HEAD, BODY)
    terminal.show_markdown(MARKDOWN)
    assert capsys.readouterr().out == f"{terminal.columns(HEAD, BODY)}\n{MARKDOWN}\n"


def test_columns_break_long_heads_at_their_words():
    text = terminal.columns(["a", "visual tokens by layer"], [["b", "1"]])
    assert [line.split() for line in text.splitlines()] == [
        ["a", "visual", "tokens"],
        ["by", "layer"],
        ["-", "-" * 13],
        ["b", "1"],
    ]
