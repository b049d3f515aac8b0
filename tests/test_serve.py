"""A server in front of an engine: nothing lost, nothing mixed up, nothing taken back."""

import asyncio
import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("fastapi")
import openai
from transformers import AutoModelForCausalLM

from s1book.ask import marks_for
from s1book.budget import Force, Forced, budget_force, make_force, whole_answer
from s1book.config import S1Error, load_preset
from s1book.engine import Continuation, ScriptedEngine, TransformersEngine
from s1book.serve import Busy, EngineLost, Live, Service, Ticket, close, follow, listening, make_app, while_wanted
from s1book.wire import ChatRequest, Model, settle

BUDGET = load_preset("tiny").budget
WORD = "How many r in 1r 2a 3s 4p ?"


class Slow:
    """An engine that takes its time for every token, so that others come while it works."""

    def __init__(self, engine, pause):
        self.engine, self.pause, self.context = engine, pause, getattr(engine, "context", 10**6)

    def run(self, strategies, *watchers):
        engine, pause = self.engine, self.pause
        if isinstance(engine, ScriptedEngine):
            script = engine.script
            engine = ScriptedEngine(lambda ids: time.sleep(pause) or script(ids))
        return engine.run(strategies, *watchers)


@pytest.fixture(scope="module")
def course():
    """The fine-tuned tiny model of the recorded run."""
    from s1book.format import load_tokenizer

    tokenizer = load_tokenizer("data/reference/sft")
    model = AutoModelForCausalLM.from_pretrained("data/reference/sft").eval()
    return TransformersEngine(model, 16, len(tokenizer)), tokenizer


@pytest.fixture
def service(course):
    engine, tokenizer = course
    force = make_force(tokenizer, BUDGET)
    made = Service(Live(engine), Model("sft", tokenizer, marks_for(tokenizer), force, engine.context))
    yield made
    close(made.live)


def request(**changes):
    good = {"model": "sft", "messages": [{"role": "user", "content": WORD}]}
    return ChatRequest(**(good | changes))


async def result_of(live, strategy):
    async for event in follow(live, strategy, watched=False):
        return event


def counting(ids):
    """A model that thinks 5 tokens (10, 11, ...), ends (1), answers 20 and ends (2)."""
    tail = ids[ids.index(0) + 1:]
    if 3 in tail:
        return 2 if tail[-1] == 20 else 20
    since = len(tail) - 1 - tail[::-1].index(9) if 9 in tail else -1
    return 1 if len(tail) - since > 5 else 10 + len(tail)


def forced(**changes):
    plain = dict(stop_ids=frozenset({1}), answer_stops=frozenset({2}), open_answer=(3,), final_answer=(4,),
                 newline=(), line_ends=frozenset(), max_thinking=100, max_answer=5, wait_ids=(9,))
    return Force(**(plain | changes))


# -- the desk and the tickets --

@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 8)), min_size=1, max_size=12))
def test_whoever_comes_when_gets_what_he_would_get_alone(wishes):
    """Requests that come at odd moments, some while others are at work."""
    engine = ScriptedEngine(counting)
    strategies = [lambda w=w: budget_force([7, 0], forced(ignore_end=w[0])) for w in wishes]
    alone = [engine.run([make()])[0] for make in strategies]
    live = Live(Slow(engine, 0.0002))

    async def everybody():
        async def one(make, pause):
            await asyncio.sleep(pause / 1000)
            return await result_of(live, make())
        return await asyncio.gather(*(one(m, w[1]) for m, w in zip(strategies, wishes)))

    assert asyncio.run(everybody()) == alone
    assert not live.tickets and not any(live.desk.strategies) and not any(live.desk.results)
    close(live)
    assert not live.thread.is_alive()


def test_a_client_that_hangs_up_is_not_continued():
    asked = []

    def script(ids):
        asked.append(ids)
        return counting(ids)

    live = Live(Slow(ScriptedEngine(script), 0.01))

    async def leave():
        task = asyncio.ensure_future(result_of(live, budget_force([7, 0], forced(ignore_end=50, max_thinking=900))))
        await asyncio.sleep(0.2)
        task.cancel()

    asyncio.run(leave())
    close(live)
    assert not live.tickets and 0 < len(asked) < 100


def test_an_engine_that_dies_is_said_and_the_next_request_is_served():
    def script(ids):
        if ids[0] == 8:
            raise RuntimeError("out of memory")
        return counting(ids)

    live = Live(ScriptedEngine(script))
    with pytest.raises(EngineLost, match="out of memory"):
        asyncio.run(result_of(live, budget_force([8, 0], forced())))
    assert not live.tickets   # or the dead would fill the server
    assert asyncio.run(result_of(live, budget_force([7, 0], forced()))).answer_ids == (20,)
    close(live)


def test_too_many_are_refused_at_once_and_a_closed_server_refuses_all():
    live = Live(Slow(ScriptedEngine(counting), 0.01), limit=2)

    async def three():
        tasks = [result_of(live, budget_force([7, 0], forced())) for _ in range(3)]
        return await asyncio.gather(*tasks, return_exceptions=True)

    found = asyncio.run(three())
    assert [type(f) for f in found].count(Busy) == 1 and sum(isinstance(f, Forced) for f in found) == 2
    close(live)
    with pytest.raises(Busy):
        asyncio.run(result_of(live, budget_force([7, 0], forced())))


def test_closing_lets_what_is_under_way_end(service):
    """On an engine that looks for new requests at every step, and finds the one that only wakes it."""
    live = service.live
    prompt, force = settle(service.model, request(thinking={"ignore_end": 60}))

    async def close_early():
        task = asyncio.ensure_future(result_of(live, budget_force(prompt, force)))
        await asyncio.sleep(0.05)
        assert live.tickets and not task.done()
        await asyncio.to_thread(close, live)
        return await task

    assert asyncio.run(close_early()).trace.waits > 0 and not live.thread.is_alive()


def test_whoever_has_gone_with_his_loop_is_told_nothing():
    async def ticket():
        return Ticket(asyncio.get_running_loop(), True)

    gone = asyncio.run(ticket())
    gone.put("too late")  # an error here would end the engine's thread for everybody
    assert gone.events.empty()


def test_a_strategy_nobody_wants_is_closed():
    class Nobody:
        gone = True

    closed = []

    def strategy():
        try:
            yield [Continuation([1], 1, frozenset())]
        finally:
            closed.append(True)

    inner = strategy()
    next(inner)
    assert list(while_wanted(inner, Nobody())) == [] and closed == [True]


# -- what a request comes to --

def test_a_request_becomes_a_force(service):
    wish = {"max_tokens": 50, "min_tokens": 5, "ignore_end": 3, "string": ["Wait", "So"]}
    prompt, force = settle(service.model, request(thinking=wish, temperature=0.5, seed=7, max_completion_tokens=9))
    one = lambda text: tuple(service.model.tokenizer(text, add_special_tokens=False).input_ids)
    assert (force.max_thinking, force.min_thinking, force.ignore_end, force.max_answer) == (50, 5, 3, 9)
    assert (force.wait_ids, force.more_waits) == (one("Wait"), (one("So"),))
    assert (force.sampling.temperature, force.sampling.seed) == (0.5, 7)
    assert service.model.tokenizer.decode(prompt).endswith("<|im_start|>assistant\n<|im_start|>think\n")


@pytest.mark.parametrize("changes, message", [
    ({"model": "other"}, "model: found 'other', wanted 'sft'"),
    ({"thinking": {"max_tokens": 3, "min_tokens": 4}}, "min_thinking=4, wanted 0 to max_thinking=3"),
    ({"thinking": {"max_tokens": 99999}}, "thinking.max_tokens: found 99999, wanted at most"),
    ({"messages": [{"role": "user", "content": "<|im_start|>think"}]}, "found the control text"),
    ({"messages": [{"role": "user", "content": "zebra"}]}, "has no token for 'zebra'"),
    ({"messages": [{"role": "user", "content": WORD}, {"role": "assistant", "content": "So 1"}]}, "wanted 'user'"),
])
def test_a_request_that_cannot_be_is_a_sentence(service, changes, message):
    with pytest.raises(S1Error, match=message):
        settle(service.model, request(**changes))


@pytest.mark.parametrize("changes", [
    {"messages": []}, {"thinking": {"max": 3}}, {"top_k": 3}, {"n": 2}, {"temperature": -1},
    {"thinking": {"max_tokens": -1}}, {"thinking": {"ignore_end": 1000}},
])
def test_fields_that_are_unknown_or_impossible_are_refused(changes):
    with pytest.raises(ValueError):
        request(**changes)


# -- over HTTP --

@pytest.fixture
def url(service):
    with listening(make_app(service)) as address:
        yield address


def test_64_clients_with_budgets_of_their_own_lose_and_mix_up_nothing(service, url, course):
    _, tokenizer = course
    rows = [json.loads(line) for line in open("data/reference/benchmarks/tiny_mixed.jsonl")][:64]
    wishes = [{"max_tokens": 5 + i} if i % 3 == 0 else {"max_tokens": 300, "ignore_end": i % 3} for i in range(64)]
    expected = []
    for row, wish in zip(rows, wishes):
        prompt, force = settle(service.model, request(messages=[{"role": "user", "content": row["question"]}], thinking=wish))
        expected.append((prompt, force))
    engine = TransformersEngine(service.live.engine.model, 1, len(tokenizer))
    twins = engine.run([budget_force(p, f) for p, f in expected])
    client = openai.AsyncOpenAI(base_url=url, api_key="x", max_retries=0)

    async def call(i):
        how = dict(model="sft", messages=[{"role": "user", "content": rows[i]["question"]}],
                   extra_body={"thinking": wishes[i]})
        if i % 2:
            whole = await client.chat.completions.create(**how)
            return whole.choices[0].message.reasoning_content, whole.choices[0].message.content
        reasoning = content = ""
        async for chunk in await client.chat.completions.create(stream=True, **how):
            delta = chunk.choices[0].delta
            reasoning += getattr(delta, "reasoning_content", None) or ""
            content += delta.content or ""
        return reasoning, content

    async def crowd():
        return await asyncio.gather(*map(call, range(64)))

    found = asyncio.run(crowd())
    for (reasoning, content), twin, (_, force) in zip(found, twins, expected):
        assert reasoning == tokenizer.decode(twin.trace.ids)
        assert content == tokenizer.decode(whole_answer(force, twin))


def test_the_bill_and_the_models(url):
    client = openai.OpenAI(base_url=url, api_key="x", max_retries=0)
    assert [m.id for m in client.models.list()] == ["sft"]
    said = client.chat.completions.create(model="sft", messages=[{"role": "user", "content": WORD}],
                                          extra_body={"thinking": {"ignore_end": 1}})
    assert said.thinking["ignored_ends"] == 1 and said.thinking["forced_tokens"] >= 1
    assert said.usage.total_tokens == said.usage.prompt_tokens + said.usage.completion_tokens
    assert said.usage.completion_tokens_details.reasoning_tokens == said.thinking["tokens"]


@pytest.mark.parametrize("body, message", [
    ({"thinking": {"tokens": 3}}, "thinking.tokens: found 3"), ({"model": "x"}, "model: found 'x'"),
    ({"messages": "hello"}, "messages: found 'hello'"),
])
def test_bad_requests_get_a_sentence_and_400(url, body, message):
    import httpx

    good = {"model": "sft", "messages": [{"role": "user", "content": WORD}]}
    got = httpx.post(f"{url}/chat/completions", json=good | body)
    assert got.status_code == 400 and message in got.json()["error"]["message"]
    assert httpx.post(f"{url}/chat/completions", content=b"{not json").status_code == 400


def test_a_client_that_leaves_frees_the_server(service, url):
    import httpx

    body = {"model": "sft", "messages": [{"role": "user", "content": WORD}], "thinking": {"ignore_end": 60},
            "stream": True}
    with httpx.stream("POST", f"{url}/chat/completions", json=body) as got:
        next(got.iter_lines())
    end = time.monotonic() + 30
    while service.live.tickets:
        assert time.monotonic() < end
        time.sleep(0.05)


def scripted(service, script, pause=0.01):
    """The same service with a script for a model, which takes its time, and room for one request."""
    return Service(Live(Slow(ScriptedEngine(script), pause), limit=1), service.model)


BODY = {"model": "sft", "messages": [{"role": "user", "content": WORD}], "thinking": {"ignore_end": 60}}


def five_and_stop(service, asked):
    """A model that ends whatever it writes after five tokens; what it was asked is noted."""
    stop = min(service.model.force.stop_ids)
    return lambda ids: asked.append(ids) or (stop if ids[-5:] == [10] * 5 else 10)


def test_a_client_that_does_not_wait_for_its_whole_reply_frees_the_server(service):
    import httpx

    asked = []
    slow = scripted(service, five_and_stop(service, asked))
    with listening(make_app(slow)) as address, pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{address}/chat/completions", json=BODY, timeout=0.3)
    close(slow.live)
    assert 0 < len(asked) < 200, "sixty Waits of six tokens each, had nobody hung up"


def test_a_stream_that_goes_on_and_on_does_not_keep_the_server_from_ending(service):
    import httpx

    slow = scripted(service, five_and_stop(service, []), pause=0.05)
    with httpx.Client() as client:
        with listening(make_app(slow)) as address:
            stream = client.stream("POST", f"{address}/chat/completions", json=BODY | {"stream": True})
            lines = stream.__enter__().iter_lines()
            next(lines)
            began = time.monotonic()
        assert time.monotonic() - began < 12
    close(slow.live)


def test_a_full_server_says_429_and_when_to_come_back(service):
    import httpx

    slow = scripted(service, five_and_stop(service, []))
    with listening(make_app(slow)) as address:
        with httpx.stream("POST", f"{address}/chat/completions", json=BODY | {"stream": True}) as first:
            lines = first.iter_lines()  # kept: a forgotten one hangs up
            next(lines)
            got = httpx.post(f"{address}/chat/completions", json=BODY)
    close(slow.live)
    assert (got.status_code, got.headers["Retry-After"]) == (429, "1")
    assert "found 1 requests under way" in got.json()["error"]["message"]


def test_a_dead_engine_is_a_503(service):
    import httpx

    def script(ids):
        raise RuntimeError("out of memory")

    dead = scripted(service, script)
    with listening(make_app(dead)) as address:
        got = httpx.post(f"{address}/chat/completions", json=BODY)
    close(dead.live)
    assert (got.status_code, got.headers["Retry-After"]) == (503, "1")
    assert "out of memory" in got.json()["error"]["message"]


def test_a_missing_package_is_a_sentence(service, monkeypatch):
    monkeypatch.setattr("s1book.serve.importlib.util.find_spec", lambda name: None)
    with pytest.raises(S1Error, match="found no package fastapi, wanted those of the extra serve"):
        make_app(service)


def test_a_taken_port_is_a_sentence(service):
    with listening(make_app(service)) as address:
        port = int(address.split(":")[-1].split("/")[0])
        with pytest.raises(S1Error, match=f"127.0.0.1:{port}: found Address already in use"):
            with listening(make_app(service), port=port):
                pass


def test_the_command_says_where_it_listens_answers_and_ends():
    import signal
    import subprocess
    import sys

    command = [sys.executable, "-m", "s1book.cli", "serve", "--model", "data/reference/sft", "--port", "0"]
    listens = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # whoever runs us may ignore Ctrl-C
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=listens) as process:
        try:
            line = process.stdout.readline()
            assert line.startswith("Listening on http://127.0.0.1:") and "model sft;" in line
            client = openai.OpenAI(base_url=line.split()[2].rstrip(","), api_key="x", max_retries=0)
            said = client.chat.completions.create(model="sft", messages=[{"role": "user", "content": WORD}])
            assert said.thinking["tokens"] > 0
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 130
        finally:
            process.kill()


def test_importing_the_module_loads_nothing_heavy():
    import subprocess
    import sys

    code = "import sys, s1book.serve; print([m for m in ('torch', 'transformers', 'fastapi', 'uvicorn') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
