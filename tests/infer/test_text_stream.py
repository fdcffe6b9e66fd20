"""Streamed text: nothing that would have to be taken back, and in the end what there is."""

import random
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizing

from jaxpipe.infer import Piece
from jaxpipe.infer.serving.text import ByteTokenizer, Tokenizer
from jaxpipe.infer.serving.text_stream import TextStream, TokenTexts
from jaxpipe.serve import Limits
from jaxpipe.serve.requests.form import Choice
from jaxpipe.serve.requests.prompts import Prompts
from jaxpipe.serve.requests.work import Work

BYTES = ByteTokenizer()
decode = BYTES.decode


def run(text: bytes, stops=()):
    stream = TextStream(BYTES, stops)
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
    own = SimpleNamespace(decode=lambda ts: "".join(words[t] for t in ts).replace("▁", " ").removeprefix(" "))
    stream = TextStream(own)
    assert [stream.push(n) for n in range(4)] == ["the", " cat", "s", " sat"]


@pytest.fixture(scope="module", params=["bytes", *tokenizing.KINDS])
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    if request.param == "bytes":
        return BYTES
    return tokenizing.make(request.param, tmp_path_factory.mktemp("tokenizer"))


def answers(tokenizer: Tokenizer):
    """Tokens of texts, and tokens that no text has, ids that there are not among them."""
    rng = random.Random(1)
    for text in (
        "日本",
        "the cat sat 日本 on 中国's mat 😀é",
        "<extra_id_0> cat <extra_id_1> sat",
        "the  cat   [tool] the dog<s>日<s>本</s>",
        " the   ",
        "   ",
    ):
        tokens = tokenizer.encode(text)
        yield tokens
        yield [token for each in tokens for token in ([3] * rng.randint(0, 1) + [each])]
    for _ in range(150):
        yield [rng.randrange(tokenizer.vocab_size + 2) for _ in range(rng.randint(1, 14))]
    yield [rng.randrange(tokenizer.vocab_size) for _ in range(200)]
    few = [rng.randrange(tokenizer.vocab_size) for _ in range(2)] + [*tokenizer.encode("日 a"), 3]
    for _ in range(100):
        yield [rng.choice(few) for _ in range(rng.randint(1, 9))]


def test_streamed_text_and_texts_of_tokens_are_the_whole_text(tokenizer):
    for tokens in answers(tokenizer):
        whole = tokenizer.decode(tokens)
        stream, texts, given, each = TextStream(tokenizer), TokenTexts(tokenizer), "", []
        for token in tokens:
            given += stream.push(token)
            assert whole.startswith(given), tokens
            each += texts.push(token)
            assert "".join(each) == given, tokens
        each += texts.finish()
        assert given + stream.finish() == whole, tokens
        assert "".join(each) == whole and len(each) == len(tokens), tokens


def test_stop_strings_are_found_in_what_any_tokenizer_writes(tokenizer):
    rng = random.Random(2)
    for tokens in answers(tokenizer):
        whole = tokenizer.decode(tokens)
        at = rng.randrange(len(whole) + 1)
        stop = whole[at : at + rng.randint(1, 3)] or "never"
        stream, given = TextStream(tokenizer, (stop,)), ""
        for token in tokens:
            given += stream.push(token)
        given += stream.finish()
        assert given == whole.partition(stop)[0] and stream.stopped == (stop in whole), (tokens, stop)


def test_characters_of_byte_fallback_come_whole_and_stop(tmp_path):
    tokenizer = tokenizing.make("BPE with byte fallback", tmp_path / "own")
    tokens = tokenizer.encode("the 日本 cat")
    assert sum(map(tokenizer.in_run, tokens)) == 6 and tokenizer.decode(tokens) == "the 日本 cat"
    stream = TextStream(tokenizer, ("本",))
    assert "".join(map(stream.push, tokens)) == "the 日" and stream.stopped


def test_an_answer_of_bytes_is_given_character_by_character(tmp_path):
    texts = TokenTexts(tokenizing.make("BPE with byte fallback", tmp_path / "own"))
    tokens = [6 + byte for byte in "日本".encode()]
    assert [text for token in tokens for text in texts.push(token)] == []
    assert texts.finish() == ["", "", "日", "", "", "本"]


@pytest.mark.parametrize("kind", ["BPE with byte fallback", "Unigram"])
def test_an_answer_of_the_server_has_the_texts_of_its_tokens_and_the_blanks_after_its_prompt(kind, tmp_path):
    tokenizer = tokenizing.make(kind, tmp_path / "own")
    plain: Any = None
    ask: Any = SimpleNamespace(logprobs=True, echo=True, n=1)
    prompt, tokens = tokenizer.pieces("the dog"), [*tokenizer.pieces("cat <extra_id_0> sat 日本"), 1]
    work = Work(plain, Prompts(tokenizer, Limits(), 500), plain, plain, ask, [prompt], [""], (1,))
    stream, choice = TextStream(tokenizer), Choice()
    for token in tokens:
        last = token == tokens[-1]
        text = stream.finish() if last else stream.push(token)
        work._add(0, choice, Piece(text, token, -0.5, "stop" if last else None))
    assert choice.tokens and [logprob for _, logprob in choice.tokens] == [-0.5] * (len(tokens) - 1)
    assert "".join(text for text, _ in choice.tokens) == tokenizer.decode(tokens)
    assert tokenizer.decode(prompt) + choice.text == tokenizer.decode(prompt + tokens)
