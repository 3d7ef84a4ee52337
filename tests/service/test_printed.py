"""Streams of jobs: lines as they end, the rest when flushed, and no more than is allowed."""

from __future__ import annotations

from nnsight_compiler.service.printed import PIECE, Allowance, Printed


def test_lines_go_as_they_end_and_the_rest_when_flushed() -> None:
    told: list[str] = []
    stream = Printed(told.append, Allowance())
    print("a", end="", file=stream)
    print("b\nc", file=stream, end="")
    assert told == ["ab\n"]
    print("d", file=stream, flush=True)
    stream.flush()
    assert told == ["ab\n", "cd\n"]


def test_long_text_goes_in_pieces() -> None:
    told: list[str] = []
    print("x" * (2 * PIECE + 1), file=Printed(told.append, Allowance()))
    assert list(map(len, told)) == [PIECE, PIECE, 2]


def test_no_more_is_told_than_is_allowed_on_both_streams_together() -> None:
    told: list[str] = []
    allowance = Allowance(bytes=6)
    first, second = Printed(told.append, allowance), Printed(told.append, allowance)
    print("abc", file=first)
    print("dü", file=second)
    print("more", file=first)
    cut = "\n… this job has printed as much as a job may; the rest is not shown\n"
    assert told == ["abc\n", f"d{cut}"]


def test_no_more_often_than_is_allowed() -> None:
    told: list[str] = []
    stream = Printed(told.append, Allowance(events=3))
    for number in range(10):
        print(number, file=stream)
    assert [text.partition("\n")[0] for text in told] == ["0", "1", "2"]
    assert told[-1].endswith("the rest is not shown\n")
