"""Requests join and leave, whatever the others do: the tokens are the generator's, and nothing is compiled again."""

import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from generating import GPT, greedy, make, prompts

from jaxpipe.errors import ConfigError
from jaxpipe.infer import Engine, QueueFullError, Request, RequestError, Sampling

GIVEN = prompts(GPT.vocab_size, (3, 9, 1, 5, 8, 4, 12, 2))
NEW = 10


class Bytes:
    """Token n is byte n + 60."""

    def decode(self, tokens):
        return bytes(token + 60 for token in tokens).decode(errors="replace")


@pytest.fixture(scope="module")
def generator():
    return make(GPT, {"pipe": 2, "data": 2}, rows=1)


@pytest.fixture(scope="module")
def engine(generator):
    with Engine(generator, Bytes(), queue=100) as engine:
        yield engine


@pytest.fixture(scope="module")
def wanted():
    return [greedy(GPT, prompt, NEW) for prompt in GIVEN]


def tokens(handle):
    return [piece.token for piece in handle if piece.token is not None]


def idle(engine):
    """Waits until no slot is taken."""
    until = time.monotonic() + 60
    while engine.metrics()["slots_busy"] and time.monotonic() < until:
        time.sleep(0.01)
    return engine.metrics()["slots_busy"] == 0


def test_twice_as_many_requests_as_slots_get_the_generators_tokens(engine, wanted):
    assert engine.generator.slots == 4
    handles = [engine.submit(Request(prompt, Sampling(max_new_tokens=NEW, logprobs=True))) for prompt in GIVEN]
    answers = [list(handle) for handle in handles]
    assert [[piece.token for piece in answer] for answer in answers] == wanted
    assert all(piece.logprob < 0 for answer in answers for piece in answer)
    assert ["".join(p.text for p in answer) for answer in answers] == [Bytes().decode(w) for w in wanted]
    assert [answer[-1].finish_reason for answer in answers] == ["length"] * len(GIVEN)
    assert all(piece.finish_reason is None for answer in answers for piece in answer[:-1])


def test_nothing_is_compiled_again(engine, wanted):
    for wave in (1, 3, 8):
        handles = [
            engine.submit(Request(p, Sampling(max_new_tokens=1 + n, temperature=n / 4, top_k=n, seed=n)))
            for n, p in enumerate(GIVEN[:wave])
        ]
        assert [len(tokens(handle)) for handle in handles] == [1 + n for n in range(wave)]
    programs = (engine.program, engine.generator.programs.admit, engine.generator.programs.start)
    assert [program._cache_size() for program in programs] == [1, 1, 1]


def test_random_arrivals_and_cancels_lose_and_mix_up_nothing(engine, wanted):
    rng = np.random.default_rng(0)
    handles = []
    for _ in range(60):
        which = int(rng.integers(len(GIVEN)))
        handles.append((which, engine.submit(Request(GIVEN[which], Sampling(max_new_tokens=NEW)))))
        if rng.random() < 0.3:
            handles[int(rng.integers(len(handles)))][1].cancel()
        if rng.random() < 0.3:
            time.sleep(0.01)
    for which, handle in handles:
        *_, last = pieces = list(handle)
        got = [piece.token for piece in pieces if piece.token is not None]
        assert got == wanted[which][: len(got)]
        assert (last.finish_reason == "length") == (len(got) == NEW)
        assert last.finish_reason in ("length", "cancelled")
    assert idle(engine)


def test_an_answer_ends_at_a_stop_string_over_tokens(engine, wanted):
    text = Bytes().decode(wanted[1])
    stop = text[3:5]
    handle = engine.submit(Request(GIVEN[1], Sampling(max_new_tokens=NEW), stop=("never", stop)))
    pieces = list(handle)
    assert "".join(piece.text for piece in pieces) == text[: text.find(stop)]
    assert pieces[-1].finish_reason == "stop"
    assert idle(engine)


def test_an_answer_ends_at_a_stop_token_whose_text_is_left_out(engine, wanted):
    stop = wanted[1][4]
    first = wanted[1].index(stop)
    sampling = Sampling(max_new_tokens=NEW, stop_token_ids=(stop,))
    *pieces, last = engine.submit(Request(GIVEN[1], sampling))
    assert [p.token for p in pieces] == wanted[1][:first]
    assert (last.token, last.text, last.finish_reason) == (stop, "", "stop")


def test_n_answers_are_those_of_n_seeds(engine):
    sampling = Sampling(max_new_tokens=6, temperature=1.5, seed=10)
    found = {}
    for piece in engine.submit(Request(GIVEN[0], sampling, n=3)):
        found.setdefault(piece.index, []).append(piece.token)
    expected = engine.generator.generate([GIVEN[0]], sampling, n=3)
    assert [found[n] for n in range(3)] == [completion.tokens for completion in expected]


def test_who_listens_late_hears_all_and_who_fails_is_left_out(engine, wanted):
    handle = engine.submit(Request(GIVEN[0], Sampling(max_new_tokens=NEW)))
    assert tokens(handle) == wanted[0]
    heard = []
    handle.listen(heard.append)
    assert [piece.token for piece in heard] == wanted[0]

    def fail(piece):
        raise OSError("gone")

    handle = engine.submit(Request(GIVEN[0], Sampling(max_new_tokens=NEW)))
    try:
        handle.listen(fail)
    except OSError:
        handle.cancel()
    assert list(handle)[-1].finish_reason in ("cancelled", "length")
    assert tokens(engine.submit(Request(GIVEN[2], Sampling(max_new_tokens=NEW)))) == wanted[2]


def test_metrics_count_what_happened(engine):
    assert idle(engine)
    before = engine.metrics()
    tokens(engine.submit(Request(GIVEN[0], Sampling(max_new_tokens=5))))
    after = engine.metrics()
    changed = {name: after[name] - before[name] for name in after if name.endswith("_total")}
    assert changed.pop("steps_total") >= 5
    assert changed == {
        "requests_total": 1,
        "finished_total": 1,
        "cancelled_total": 0,
        "failed_total": 0,
        "prompt_tokens_total": 3,
        "tokens_total": 5,
    }
    assert after["slots"] == 4 and after["queued"] == 0
    assert after["time_to_first_token_s"] > 0 and after["time_per_output_token_s"] > 0 and after["tokens_per_s"] > 0
    assert engine.tokens_per_tick == 1 + 4


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([1] * 30, Sampling(max_new_tokens=10)), "exceed max_len=32; try max_new_tokens=2"),
        (Request([], Sampling()), "has 0 tokens"),
        (Request([1], Sampling(max_new_tokens=1), stop=("",)), "must not hold empty texts"),
        (Request([1], Sampling(max_new_tokens=1), n=0), "n=0 must be"),
    ],
)
def test_a_request_that_cannot_be_answered_is_refused_at_once(engine, request_, message):
    with pytest.raises(ConfigError, match=message):
        engine.submit(request_)


def stalled(generator, monkeypatch, turn):
    """An engine whose turns do something else."""
    monkeypatch.setattr(Engine, "_turn", turn)
    monkeypatch.setattr(type(generator.programs), "start", lambda self: None)
    return Engine(generator, queue=2)


def test_a_full_queue_refuses_and_room_takes_again(generator, monkeypatch):
    go = threading.Event()
    inside = threading.Event()

    def turn(engine, state, joining):
        inside.set()
        go.wait(60)
        raise OSError("the device is gone")

    engine = stalled(generator, monkeypatch, turn)
    handles = [engine.submit(Request([1], Sampling(max_new_tokens=1)))]
    inside.wait(60)
    handles += [engine.submit(Request([1], Sampling(max_new_tokens=1))) for _ in range(5)]
    with pytest.raises(QueueFullError, match="queue=2; try again later"):
        engine.submit(Request([1], Sampling(max_new_tokens=1)))
    go.set()
    for handle in handles:  # what ends the engine reaches all that wait
        with pytest.raises(OSError, match="the device is gone"):
            list(handle)
    assert isinstance(engine.error, OSError)
    with pytest.raises(RuntimeError, match="the engine has stopped: the device is gone"):
        engine.submit(Request([1], Sampling(max_new_tokens=1)))
    engine.close()


def test_closing_drains_or_cancels(generator, engine, wanted):
    for drain in (True, False):
        other = Engine(generator, Bytes())
        handles = [other.submit(Request(prompt, Sampling(max_new_tokens=NEW))) for prompt in GIVEN]
        other.close(drain=drain)
        ends = {list(handle)[-1].finish_reason for handle in handles}
        assert ends == ({"length"} if drain else {"cancelled"}) or (not drain and "cancelled" in ends)
        with pytest.raises(ConfigError, match="is closed"):
            other.submit(Request([1], Sampling(max_new_tokens=1)))
    assert tokens(engine.submit(Request(GIVEN[3], Sampling(max_new_tokens=NEW)))) == wanted[3]


def test_ticks_below_the_ring_period_are_refused(generator):
    with pytest.raises(ConfigError, match="ticks=1 must be a whole number of at least 2; try 2"):
        Engine(generator, ticks=1)
    with Engine(generator) as bare, pytest.raises(ConfigError, match="needs a tokenizer; try stop_token_ids"):
        bare.submit(Request([1], Sampling(max_new_tokens=1), stop=("x",)))


class Panic(BaseException):
    """As PyO3's for a panic in Rust: no Exception."""


class Fragile(Bytes):
    """Makes text of nothing that holds token `bad`."""

    def __init__(self, bad, error):
        self.bad, self.error = bad, error

    def decode(self, tokens):
        if self.bad in tokens:
            raise self.error
        return super().decode(tokens)


@pytest.mark.parametrize("error", [ValueError("no text"), MemoryError(), Panic("index out of bounds")])
def test_an_error_of_one_request_ends_it_alone(generator, engine, error):
    asked = [Request(GIVEN[0], Sampling(temperature=2.0, seed=n, max_new_tokens=NEW)) for n in range(4)]
    wanted = [tokens(engine.submit(request)) for request in asked]
    bad = next(token for token in wanted[0] if any(token not in other for other in wanted))
    spared = [n for n, other in enumerate(wanted) if bad not in other]
    with Engine(generator, Fragile(bad, error), queue=100) as fragile:
        hit = fragile.submit(replace(asked[0], n=2))
        others = [fragile.submit(asked[n]) for n in spared]
        with pytest.raises(RequestError, match=type(error).__name__) as caught:
            tokens(hit)
        assert caught.value.__cause__ is error
        assert [tokens(handle) for handle in others] == [wanted[n] for n in spared]
        assert idle(fragile)
        assert fragile.error is None
        assert fragile.metrics()["failed_total"] >= 1


def test_a_row_that_cannot_be_made_ends_its_request_alone(generator, wanted, monkeypatch):
    made = generator.row

    def row(row, ticket):
        return made(row, ticket) if len(row.tokens) != len(GIVEN[0]) else 1 / 0

    with Engine(generator, queue=100) as engine:
        monkeypatch.setattr(generator, "row", row)
        hit, spared = (engine.submit(Request(prompt, Sampling(max_new_tokens=NEW))) for prompt in GIVEN[:2])
        with pytest.raises(RequestError, match="ZeroDivisionError"):
            tokens(hit)
        assert tokens(spared) == wanted[1]
        assert idle(engine)


WRONG = {
    "stops": ({"stop": ("", "a")}, "longer ones than 256"),
    "long stop": ({"stop": ("x" * 257,)}, "longer ones than 256"),
    "many stops": ({"stop": ("x",) * 17}, "more than 16"),
    "no stop": ({"stop": 5}, "more than 16"),
    "sampling": ({"sampling": {"temperature": 0}}, "must be a Sampling"),
    "n": ({"n": True}, "whole number"),
    "huge n": ({"n": 10**9}, "exceeds queue"),
    "prompt": ({"prompt_tokens": 5}, "no list of token ids"),
    "text": ({"prompt_tokens": "abc"}, "no list of token ids"),
    "none": ({"prompt_tokens": None}, "no list of token ids"),
    "letters": ({"prompt_tokens": ["1"]}, "no token id"),
    "fraction": ({"prompt_tokens": [1.0]}, "no token id"),
}


@pytest.mark.parametrize(("wrong", "message"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_request_is_refused_before_the_thread_sees_it(engine, wrong, message):
    with pytest.raises(ConfigError, match=message):
        engine.submit(Request(**{"prompt_tokens": GIVEN[0], **wrong}))
    assert engine.error is None


def test_one_stop_text_is_one_stop_text(engine):
    whole = "".join(piece.text for piece in engine.submit(Request(GIVEN[0], Sampling(max_new_tokens=NEW))))
    stop = whole[3:5]
    cut = "".join(piece.text for piece in engine.submit(Request(GIVEN[0], Sampling(max_new_tokens=NEW), stop=stop)))
    assert cut == whole[: whole.index(stop)]


def test_an_engine_whose_thread_hangs_can_be_left_behind(generator):
    going, over = threading.Event(), threading.Event()

    class Hanging(Bytes):
        def decode(self, tokens):
            going.set()
            over.wait(60)
            return super().decode(tokens)

    engine = Engine(generator, Hanging())
    engine.submit(Request(GIVEN[0], Sampling(max_new_tokens=2)))
    assert going.wait(60)
    engine.close(drain=False, timeout_s=0.01)
    assert isinstance(engine.error, TimeoutError)
    engine.close()
    over.set()
