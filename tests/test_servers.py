"""A server of token ids: retries with an end, bounded concurrency, streams that break off, and refusals in sentences."""

import pytest

from s1book.backends import GROWTH, VLLM, Completions, EngineStopped, rank
from s1book.config import S1Error, Server, load_preset
from s1book.engine import Continuation, FlowEngine, ScriptedEngine, open_engine

from token_server import TokenServer


def script(ids):
    """Something that depends on everything; 1 and 2 are ends."""
    first = (sum((k + 1) * t for k, t in enumerate(ids)) * 7) % 50 + 3
    return [*([1] if first % 11 == 0 else []), first, 2, 3, 4]


def two_turns(i):
    [a] = yield [Continuation([5, 6 + i], 20, frozenset({1}), phase="thinking")]
    [b] = yield [Continuation([5, 6 + i] + a.new_ids + [9], 5, frozenset({1}), min_new_tokens=1, phase="answer")]
    return a, b


def engine_on(server, **terms):
    return FlowEngine(Completions(Server(**{"like": "vllm", "url": server.url, "wait": 0.01} | terms), "base", 60))


WANTED = ScriptedEngine(script).run(two_turns(i) for i in range(10))


@pytest.mark.parametrize("watch", [None, [].append])
@pytest.mark.parametrize("troubles", [[], [500, 429, "drop", 503], ["drop"] * 4, ["half"] * 3])
def test_troubles_that_pass_change_nothing(troubles, watch):
    with TokenServer(script, troubles=troubles) as server:
        assert engine_on(server, concurrency=3).run([two_turns(i) for i in range(10)], on_tokens=watch) == WANTED
        assert server.peak <= 3 and server.troubles == []
        assert len(server.bodies) == 20 + len(troubles) - (troubles.count("half") if watch is None else 0)


def test_a_stream_that_breaks_off_is_told_anew():
    rows = {}
    with TokenServer(script, troubles=["half"] * 5) as server:
        def watch(t):
            rows.setdefault(t.strategy, [])[t.at:] = t.ids
        results = engine_on(server).run([two_turns(i) for i in range(10)], on_tokens=watch)
    assert results == WANTED
    assert rows == {i: [5, 6 + i] + a.new_ids + [9] + b.new_ids for i, (a, b) in enumerate(WANTED)}


def test_tries_have_an_end_and_the_rest_is_resumable():
    told = []
    with TokenServer(script, troubles=[None] * 7 + [500] * 3) as server:
        engine = engine_on(server, tries=3, concurrency=1)
        with pytest.raises(EngineStopped, match="stopped after .* of 10 .*Transient.*a trouble") as caught:
            engine.run([two_turns(i) for i in range(10)], lambda i, result: told.append((i, result)))
        assert len(server.bodies) == 10 and told and all(WANTED[i] == result for i, result in told)
        assert engine.run(caught.value.books) == WANTED
    assert len(told) == 10


@pytest.mark.parametrize("trouble, words", [
    ("text", "no token_ids"), ("eos", "wanted the id of a stop token"), (401, "refuses all requests"), (400, "a trouble")])
def test_what_trying_again_cannot_mend_is_said_at_once(trouble, words):
    with TokenServer(script, troubles=[trouble]) as server:
        with pytest.raises(EngineStopped, match=words):
            engine_on(server, concurrency=1).run([two_turns(0)])
        assert len(server.bodies) == 1


def test_a_server_that_is_gone_is_a_sentence_and_its_work_goes_on_elsewhere():
    with TokenServer(script) as server:
        engine = engine_on(server, tries=2)
    with pytest.raises(EngineStopped, match="of 10 .*Connection") as caught:
        engine.run([two_turns(i) for i in range(10)])
    assert ScriptedEngine(script).run(caught.value.books) == WANTED


def test_continuations_go_before_new_requests():
    with TokenServer(script) as server:
        engine_on(server, concurrency=1).run([two_turns(i) for i in range(4)])
        assert [b["prompt"][1] for b in server.bodies] == [6, 6, 7, 7, 8, 8, 9, 9]


def test_priority_is_the_order_of_coming_in_ample_memory_and_age_in_scarce():
    ask = Continuation([5] * 10, 8, frozenset())
    room = GROWTH * 10 * 3  # of three requests with 10 ids that grow
    for memory, wanted in (room, 9), (room - 1, 4):
        backend = VLLM(None, 512, 512, 1024, room=memory, under_way={7: 0, 8: 0})
        assert rank(backend, ask, name=9, since=4) == wanted
        assert rank(backend, ask, name=9, since=9) == 9, "a new strategy, in any case"


def test_every_setting_is_sent_so_that_no_default_of_the_server_counts():
    with TokenServer(script) as server:
        engine_on(server).run([two_turns(0)])
        wanted = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
                  "frequency_penalty": 0.0, "ignore_eos": True, "max_tokens": 20, "min_tokens": 0, "stop_token_ids": [1]}
        assert {k: server.bodies[0][k] for k in wanted} == wanted


@pytest.mark.parametrize("terms, model, words", [
    ({"usd_out": 2.0}, "base", "found a price"), ({}, "sft", r"found the models \['base'\], wanted 'sft'")])
def test_servers_that_will_not_do_are_refused_at_the_door(terms, model, words):
    with TokenServer(script) as server, pytest.raises(S1Error, match=words):
        Completions(Server(like="vllm", url=server.url, **terms), model, 60)


def test_nobody_there():
    with TokenServer(script) as server:
        url = server.url
    with pytest.raises(S1Error, match="127.0.0.1.*Connection"):
        Completions(Server(like="vllm", url=url), "base", 60)


def test_a_preset_opens_a_server(tiny_folder):
    with TokenServer(script, model="tiny_model", context=77) as server:
        preset = load_preset("tiny", ["engine.kind=server", "engine.server={like: vllm, url: " + server.url + "}"])
        engine, tokenizer = open_engine(preset, tiny_folder)
        assert engine.backend.context == 77 and engine.backend.vocabulary == len(tokenizer)
        assert engine.run([two_turns(0)]) == WANTED[:1]
