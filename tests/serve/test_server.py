"""The server as its clients see it, over a real socket, on an engine whose answers are known beforehand."""

import re
from pathlib import Path

import openai
import pytest
from fake_engine import EOS, Bytes, FakeEngine
from serving import serving


@pytest.fixture(scope="module")
def client(served):
    with served.client() as client:
        yield client


def say(client, prompt, **options):
    return client.completions.create(model="tiny", prompt=prompt, **{"temperature": 0, "max_tokens": 8} | options)


def chat(client, *texts, **options):
    messages = [{"role": role, "content": text} for role, text in zip(("system", "user"), texts, strict=False)]
    return client.chat.completions.create(model="tiny", messages=messages, temperature=0, **options)


def test_a_completion_says_text_reason_and_usage(client):
    answer = say(client, "hello")
    assert answer.object == "text_completion" and answer.model == "tiny" and answer.id.startswith("cmpl-")
    assert [(choice.text, choice.finish_reason) for choice in answer.choices] == [("hellohel", "length")]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (5, 8, 13)


def test_several_prompts_of_several_answers_each_keep_their_order(client):
    answer = say(client, ["abc", "xy"], n=2, max_tokens=3)
    assert [(choice.index, choice.text) for choice in answer.choices] == [
        (0, "abc"),
        (1, "abc"),
        (2, "xyx"),
        (3, "xyx"),
    ]
    by_ids = say(client, [[97, 98, 99], [120, 121]], n=2, max_tokens=3)
    assert [choice.text for choice in by_ids.choices] == [choice.text for choice in answer.choices]


def test_a_stream_joins_to_the_whole_answer_for_every_choice(client):
    texts, ends, usage = {}, {}, None
    for chunk in say(client, ["hello", "bye"], n=2, stream=True, stream_options={"include_usage": True}, echo=True):
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            ends[choice.index] = choice.finish_reason
        usage = chunk.usage or usage
    assert texts == {0: "hellohellohel", 1: "hellohellohel", 2: "byebyebyeby", 3: "byebyebyeby"}
    assert ends == dict.fromkeys(range(4), "length")
    assert usage is not None and (usage.prompt_tokens, usage.completion_tokens) == (8, 32)


def test_a_stream_is_server_sent_events_that_end_with_done(http):
    options = {"prompt": "ab", "max_tokens": 2, "temperature": 0, "stream": True}
    answer = http.post("/v1/completions", json=options)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: {") for event in events[:-2])


def test_a_chat_goes_through_the_template_whole_and_streamed(client):
    whole = chat(client, "be brief", "hi", max_completion_tokens=20)
    assert whole.object == "chat.completion" and whole.id.startswith("chatcmpl-")
    message = whole.choices[0].message
    assert (message.role, message.content) == ("assistant", "<system>be brief<use")
    chunks = list(chat(client, "be brief", "hi", max_tokens=20, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length"


def test_parts_of_text_and_developers_are_taken(client):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "x"}, {"role": "user", "content": parts}]
    answer = client.chat.completions.create(model="tiny", messages=messages, temperature=0, max_tokens=17)
    assert answer.choices[0].message.content == "<system>x<user>ab"


def test_answers_end_at_stop_texts_at_the_end_token_and_where_there_is_no_room(client):
    assert (stopped := say(client, "a.b", stop=["."]).choices[0]).text == "a"
    assert stopped.finish_reason == "stop"
    ended = say(client, [97, EOS])
    assert (ended.choices[0].text, ended.choices[0].finish_reason, ended.usage.completion_tokens) == ("a", "stop", 2)
    assert chat(client, "abc").usage.completion_tokens == 120


def test_a_seed_repeats_an_answer_and_none_does_not(client):
    one, same, other = (say(client, "x", temperature=1.0, seed=seed).choices[0].text for seed in (7, 7, 8))
    assert one == same != other
    several = say(client, "x", temperature=1.0, seed=7, n=2)
    assert [choice.text for choice in several.choices] == [one, other]
    assert len({say(client, "x", temperature=1.0).choices[0].text for _ in range(10)}) > 1
    assert say(client, "x", temperature=1.0, seed=-1).choices[0].text


def test_log_probabilities_of_chosen_tokens_in_both_forms(client):
    text = say(client, "ab", logprobs=0, max_tokens=3).choices[0].logprobs
    assert (text.tokens, text.token_logprobs, text.text_offset) == (["a", "b", "a"], [-0.5] * 3, [0, 1, 2])
    content = chat(client, "ab", logprobs=True, max_tokens=2).choices[0].logprobs.content
    assert [(one.token, one.bytes, one.logprob) for one in content] == [("<", [60], -0.5), ("s", [115], -0.5)]
    joined = [c.choices[0].logprobs for c in say(client, "ab", logprobs=0, max_tokens=3, stream=True)]
    assert [token for part in joined if part for token in part.tokens] == ["a", "b", "a"]
    half = say(client, [0xC3, 0xA9], logprobs=0, max_tokens=2).choices[0].logprobs
    assert half.tokens == ["", "é"]


def test_models_are_listed_and_others_are_not_there(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "jaxpipe"
    for call in (
        lambda: client.models.retrieve("gpt"),
        lambda: client.completions.create(model="gpt", prompt="x"),
    ):
        with pytest.raises(openai.NotFoundError, match="model 'gpt' is not here; try 'tiny'"):
            call()


def test_options_that_ask_for_nothing_are_taken(client):
    nothing = {
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "logit_bias": {},
        "suffix": None,
        "user": "me",
        "best_of": 1,
    }
    assert say(client, "x", **nothing).choices[0].text
    nothing = {
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "top_logprobs": 0,
        "store": False,
    }
    assert chat(client, "x", "y", max_tokens=1, **nothing).choices[0].message.content


def test_health_and_metrics_count_what_happened(client, http):
    say(client, "hello")
    assert http.get("/health").json() == {"status": "ok"}
    lines = http.get("/metrics").text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert float(values["jaxpipe_generated_tokens_total"]) >= 8
    assert float(values['jaxpipe_http_answers_total{path="/v1/completions",status="200"}']) >= 1
    first = "jaxpipe_time_to_first_token_seconds"
    assert values[f'{first}_bucket{{le="+Inf"}}'] == values[f"{first}_count"]
    assert values["jaxpipe_engine_slots"] == "16" and values["jaxpipe_up"] == "1"
    assert len({line for line in lines if line.startswith("# TYPE")}) == sum(x.startswith("# TYPE") for x in lines)


def test_keys_open_all_but_health():
    engine = FakeEngine()
    with serving(engine, Bytes(), keys=("secret", "other")) as served, served.http() as http:
        for headers in ({}, {"Authorization": "Bearer secre"}, {"Authorization": "Basic secret"}):
            for answer in (
                http.post("/v1/completions", json={"prompt": "x"}, headers=headers),
                http.get("/metrics", headers=headers),
                http.get("/v1/models", headers=headers),
            ):
                assert answer.status_code == 401
                assert answer.json()["error"]["code"] == "invalid_api_key"
        assert http.get("/health").status_code == 200
        for key in ("secret", "other"):
            assert say(served.client(key), "x").choices[0].text
        with pytest.raises(openai.AuthenticationError):
            say(served.client("wrong"), "x")
    engine.close()


def test_the_client_of_the_page_works_as_written(served, capsys):
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", page, flags=re.S)
    exec(program.replace("http://127.0.0.1:8000", served.url), {})
    assert capsys.readouterr().out.startswith("def main(def main(def main(def main(def  length 40\n")
