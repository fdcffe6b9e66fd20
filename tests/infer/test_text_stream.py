"""Streamed text: nothing that would have to be taken back, and in the end what there is."""

import random

import pytest

from jaxpipe.infer.text_stream import TextStream


def decode(tokens):
    return bytes(tokens).decode(errors="replace")


def run(text: bytes, stops=()):
    stream = TextStream(decode, stops)
    pieces = []
    for byte in text:
        pieces.append(stream.push(byte))
        if stream.stopped:
            return pieces, True
    return [*pieces, stream.finish()], stream.stopped


def test_characters_are_given_whole():
    pieces, _ = run("aé€😀b".encode())
    assert [piece for piece in pieces if piece] == ["a", "é", "€", "😀", "b"]


@pytest.mark.parametrize("text", [b"\xff\xff\xffab", b"a\xf0\x9f", b"\xf0\x9fa\x80", b"\xe2\x82\xe2\x82\xac"])
def test_broken_bytes_come_out_as_the_decoder_writes_them(text):
    pieces, _ = run(text)
    assert "".join(pieces) == decode(text)


@pytest.mark.parametrize(
    ("text", "stops", "wanted"),
    [
        ("abcSTOPdef", ("STOP",), "abc"),
        ("abcSTSTOP", ("STOP",), "abcST"),
        ("abcSTO", ("STOP",), "abcSTO"),
        ("aaab", ("aab",), "a"),
        ("xyz", ("z", "yz"), "x"),
        ("a\n\nb", ("\n\n",), "a"),
        ("é€😀", ("€😀",), "é"),
    ],
)
def test_text_ends_before_the_first_stop_string(text, stops, wanted):
    pieces, stopped = run(text.encode(), stops)
    assert "".join(pieces) == wanted and stopped == (wanted != text)


def test_what_was_given_is_always_a_beginning_of_the_whole():
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(rng.choice("ab€é😀") for _ in range(12))
        stop = "".join(rng.choice("ab€") for _ in range(rng.randint(1, 3)))
        whole = text[: text.find(stop)] if stop in text else text
        given = ""
        pieces, stopped = run(text.encode(), (stop,))
        for piece in pieces:
            given += piece
            assert whole.startswith(given)
        assert given == whole and stopped == (stop in text)


def test_a_decoder_that_drops_the_space_of_a_first_word_loses_none():
    words = ["▁the", "▁cat", "s", "▁sat"]
    stream = TextStream(lambda tokens: "".join(words[t] for t in tokens).replace("▁", " ").removeprefix(" "))
    assert [stream.push(n) for n in range(4)] == ["the", " cat", "s", " sat"]
