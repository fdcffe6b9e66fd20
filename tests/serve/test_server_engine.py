"""The server on the real engine: clients get what it gives, token for token, whoever else is there."""

import asyncio
import gc
import json
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import openai
import pytest
from fake_engine import EOS, Bytes
from generating import ENCDEC, canonical
from serving import events, serving, wait_for

from jaxpipe.infer import Engine, Generator, Request, Sampling
from jaxpipe.models.build import gpt_model
from jaxpipe.models.gpt import GPTConfig
from jaxpipe.runtime.layout.mesh import make_mesh
from jaxpipe.runtime.sequential import sequential

NEW = 12
PROMPTS = ["hello", "a", "pipelines, all of them", "é", "x" * 40]


@pytest.fixture(scope="module")
def served():
    cfg = GPTConfig(vocab_size=257, max_seq_len=64, num_layers=2, num_heads=2, d_model=16)
    batch = {name: jnp.zeros((1, 8), int) for name in ("tokens", "targets")}
    params = sequential(gpt_model(cfg)).init(jax.random.key(0), batch)
    generator = Generator(cfg, params, mesh=make_mesh(pipe=2), rows=4, max_len=64, chunk=8)
    with Engine(generator, Bytes(), queue=200) as engine, serving(engine, Bytes()) as served:
        yield served


def wanted(served, prompts, **options):
    """What the engine itself says."""
    sampling = Sampling(max_new_tokens=NEW, stop_token_ids=(EOS,), **options)
    handles = [served.service.engine.submit(Request(Bytes().encode(prompt), sampling)) for prompt in prompts]
    return [Bytes().decode([piece.token for piece in handle]) for handle in handles]


def test_clients_get_what_the_engine_gives(served):
    greedy, drawn = wanted(served, PROMPTS), wanted(served, PROMPTS, temperature=1.0, top_p=0.9, seed=5)
    with served.client() as client:

        def say(prompt, **options):
            return client.completions.create(model="tiny", prompt=prompt, max_tokens=NEW, **options)

        whole = say(PROMPTS, temperature=0).choices
        assert [choice.text for choice in whole] == greedy
        for prompt, text in zip(PROMPTS, drawn, strict=True):
            chunks = list(say(prompt, temperature=1, top_p=0.9, seed=5, stream=True, logprobs=0))
            assert "".join(chunk.choices[0].text for chunk in chunks) == text
            logprobs = [x for chunk in chunks for x in (chunk.choices[0].logprobs or Empty).token_logprobs]
            assert all(-20 < x < 0 for x in logprobs) and logprobs
        stop = greedy[0][3]
        assert say(PROMPTS[0], temperature=0, stop=stop).choices[0].text == greedy[0].split(stop)[0]
        chat = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "hi"}], temperature=0, max_tokens=NEW
        )
        assert chat.choices[0].message.content == wanted(served, ["<user>hi"])[0]
        with pytest.raises(openai.BadRequestError, match="max_tokens=60 must be at most 59"):
            client.completions.create(model="tiny", prompt="hello", max_tokens=60)


def test_an_encoder_decoder_is_served():
    """Prompts are sources: as long as there is room for sources, whatever the answer's length."""
    cfg = replace(ENCDEC, vocab_size=257)
    generator = Generator(cfg, canonical(cfg), mesh=make_mesh(pipe=2), rows=2, max_len=NEW + 1, max_source_len=48)
    sampling = Sampling(max_new_tokens=NEW, stop_token_ids=(EOS,))
    answers = generator.generate([Bytes().encode(prompt) for prompt in PROMPTS], sampling)
    texts = [Bytes().decode([token for token in answer.tokens if token != EOS]) for answer in answers]
    with (
        Engine(generator, Bytes(), queue=20) as engine,
        serving(engine, Bytes(), source_len=48) as served,
        served.client() as client,
    ):
        given = client.completions.create(model="tiny", prompt=PROMPTS, max_tokens=NEW, temperature=0)
        assert [choice.text for choice in given.choices] == texts
        with pytest.raises(openai.BadRequestError, match="48"):
            client.completions.create(model="tiny", prompt="x" * 49, max_tokens=1)


class Empty:
    token_logprobs = ()


def test_200_streams_of_which_some_leave_are_not_mixed_up(served):
    """The slots are 8: most wait, and leave or end at any time. Memory stays as it is."""
    prompts = [f"<{number}>" for number in range(200)]
    texts, engine = wanted(served, prompts), served.service.engine
    blocks, arrays = [], []
    for _ in range(3):
        outcomes = asyncio.run(many(served.url, prompts, texts))
        assert [outcome for outcome in outcomes if outcome not in ("done", "left")] == []
        assert outcomes.count("done") == 133
        wait_for(lambda: engine.metrics()["slots_busy"] == engine.metrics()["queued"] == len(served.service.desk) == 0)
        del outcomes
        gc.collect()
        blocks.append(sys.getallocatedblocks())
        arrays.append(len(jax.live_arrays()))
    assert abs(blocks[2] - blocks[1]) < 0.01 * blocks[1]
    assert arrays[2] <= arrays[1]


async def many(url, prompts, texts):
    async def one(number):
        body = {"prompt": prompts[number], "temperature": 0, "max_tokens": NEW, "stream": True}
        text = ""
        async for event in events(url, json.dumps(body).encode()):
            if event == "[DONE]":
                assert text == texts[number]
                return "done"
            text += json.loads(event)["choices"][0]["text"]
            assert texts[number].startswith(text)
            if number % 3 == 0:
                return "left"

    return await asyncio.gather(*map(one, range(len(prompts))), return_exceptions=True)
