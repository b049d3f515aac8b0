"""A server of texts, `transformers serve`: exact ids out of texts, or a sentence; never a guess."""

import heapq
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import ExitStack
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines import HOSTILE, VOCABULARY
from s1book import textserver
from s1book.backends import Completions, EngineStopped, widen_heads
from s1book.budget import budget_force
from s1book.client import Stop
from s1book.config import S1Error, Server, load_preset
from s1book.engine import Continuation, FlowEngine, Sampling, ScriptedEngine, open_engine
from s1book.format import text_ids
from s1book.pretraining import make_tokenizer
from s1book.textserver import TextServer, spoken, written
from test_conformance import forced, once, prompt

TOKENIZER = make_tokenizer()
SPECIAL = sorted(TOKENIZER.all_special_ids)
WORDS = sorted({i for text in ("So 1\n", "Wait\n", "Answer: 4", "a b") for i in TOKENIZER(text).input_ids})


# ---------------------------------------------------------------- the ids of a text, with a server that we write

class Pretend:
    """What `transformers serve` does with a request, without HTTP: texts in, texts and counts out."""

    def __init__(self, script):
        self.script, self.asked = script, 0

    def __call__(self, backend, ids, config):
        config, new = json.loads(config), []
        self.asked += 1
        read = TOKENIZER(spoken(TOKENIZER, ids)).input_ids
        while len(new) < config["max_new_tokens"]:
            early = len(new) < config["min_new_tokens"]
            new.append(next(t for t in self.script(read + new) if not (early and t in config["eos_token_id"])))
            if new[-1] in config["eos_token_id"]:
                break
        return TOKENIZER.decode(new, skip_special_tokens=True), len(new)


def lines(seed, often):
    """A script that depends on the last ids: words, or now and then a special token or a line break."""
    def script(ids):
        luck = hash((seed, *ids[-6:])) % 1000
        ranked = [WORDS[luck % len(WORDS)], *WORDS]
        return [SPECIAL[luck % len(SPECIAL)], *ranked] if luck < often else ranked
    return script


asks = st.builds(
    Continuation, st.just(TOKENIZER("<|im_start|>think\nSo 1\n").input_ids), st.integers(1, 12),
    st.frozensets(st.sampled_from([*SPECIAL, *WORDS]), max_size=4), min_new_tokens=st.integers(0, 3))


@settings(max_examples=400, deadline=None)
@given(asks, st.integers(0, 10 ** 6), st.sampled_from([0, 50, 200, 600]))
def test_ids_are_the_model_s_or_the_reply_is_refused(ask, seed, often):
    script = lines(seed, often)
    [wanted] = ScriptedEngine(script).run([once(ask)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(textserver, "complete", Pretend(script))
        try:
            found = written(TextServer(Server(like="transformers"), "m", TOKENIZER, 512), ask)
        except Stop as refusal:
            shown = [*ask.ids, *wanted.new_ids]
            assert set(SPECIAL) & set(wanted.new_ids) or TOKENIZER(TOKENIZER.decode(shown)).input_ids != shown, refusal
            return
    assert found == (wanted.new_ids, wanted.stop_id)


def test_a_stop_is_named_although_no_text_shows_it(monkeypatch):
    backend = TextServer(Server(like="transformers"), "m", TOKENIZER, 512)
    start = TOKENIZER("So 1\n").input_ids
    for stop in SPECIAL:
        pretend = Pretend(lambda ids, stop=stop: [WORDS[0] if len(ids) < len(start) + 2 else stop, *WORDS])
        monkeypatch.setattr(textserver, "complete", pretend)
        assert written(backend, Continuation(start, 9, frozenset(SPECIAL))) == ([WORDS[0]] * 2, stop)
        assert pretend.asked <= 1 + len(SPECIAL)
    with pytest.raises(Stop, match="special tokens that are no ends of this request"):
        written(backend, Continuation(start, 9, frozenset(SPECIAL[:1])))


def test_the_oldest_strategy_is_served_first():
    server, ask = TextServer(None, "base", TOKENIZER, 64), Continuation([5], 1, frozenset())
    for name, since in (3, 3), (4, 4), (5, 3), (6, 2):
        server.add(name, ask, since, False)
    assert [heapq.heappop(server.waiting)[1] for _ in range(4)] == [6, 3, 5, 4]


def test_what_cannot_be_said_or_drawn_is_refused():
    start = TOKENIZER("So 1\n").input_ids
    silent = [i for i in range(VOCABULARY) if TOKENIZER(TOKENIZER.decode([i])).input_ids != [i]]
    for i in silent[:3]:
        with pytest.raises(Stop, match="wanted the same; use a server that takes token ids"):
            spoken(TOKENIZER, [*start, i, i])
    with pytest.raises(Stop, match="found temperature=0.7, wanted 0"):
        TextServer(Server(like="transformers"), "m", TOKENIZER, 512).add(
            0, Continuation(start, 1, frozenset(), Sampling(0.7)), False, False)


# ---------------------------------------------------------------- transformers serve itself

SFT = Path("data/reference/sft").resolve()  # a model that ends by itself, and writes no special token in between


@cache
def tuned():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(SFT, dtype="float32").eval()


def oracle(strategies):
    """The whole row through the model for every token, nothing kept."""
    import torch

    def script(ids):
        with torch.inference_mode():
            return tuned()(torch.tensor([ids])).logits[0, -1].argsort(descending=True).tolist()

    return ScriptedEngine(script).run(strategies)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The fine-tuned tiny model as a Llama, for which transformers takes the tokenizer as it is; defaults are hostile."""
    target = tmp_path_factory.mktemp("text") / "sft"
    widen_heads(SFT, target)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SFT / name, target)
    (target / "generation_config.json").write_text(json.dumps(HOSTILE))
    return target


@pytest.fixture(scope="module")
def served(folder):
    """`transformers serve` with it, in a process of its own."""
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        pytest.skip("transformers serve wants fastapi, uvicorn, openai and pydantic: install the extra serve")
    if find_spec("transformers.cli.serving") is None or find_spec("transformers.cli.serving.completion") is None:
        pytest.skip("this transformers serves no /v1/completions: wanted 5.13 or later")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with ExitStack() as rest:
        log = rest.enter_context(open(folder.parent / "transformers_serve.log", "w"))
        process = subprocess.Popen(
            [str(Path(sys.executable).with_name("transformers")), "serve", folder.name, "--port", str(port), "--host",
             "127.0.0.1", "--device", "cpu", "--dtype", "float32"], cwd=folder.parent, stdout=log, stderr=log,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(folder.parent), "OMP_NUM_THREADS": "1"})
        rest.callback(process.wait, 30)
        rest.callback(process.kill)
        for _ in range(600):
            assert process.poll() is None, Path(log.name).read_text()[-2000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"


@pytest.fixture
def engine(served, folder):
    return FlowEngine(TextServer(Server(like="transformers", url=served, wait=0.01), folder.name, TOKENIZER, 512))


def test_budget_forcing_on_transformers_serve_is_the_oracle_s(engine):
    wishes = [forced(max_thinking=200), forced(max_thinking=200, ignore_end=2), forced(max_thinking=7, ignore_end=1), forced(max_thinking=0),
              forced(min_thinking=30, max_thinking=34), forced(ignore_end=1, wait_ids=())]

    def run(engine):
        return engine([budget_force(prompt(i), wishes[i]) for i in range(6)])

    assert run(engine.run) == run(oracle)
    assert len({r.trace.end_reason for r in run(oracle)}) == 2


def test_limits_and_stops_on_transformers_serve(engine):
    line = text_ids(TOKENIZER, "\n")[0]
    asks = [Continuation(prompt(0), n, stops, min_new_tokens=least)
            for n in (1, 7, 30) for stops in (frozenset({line, 10 ** 6}), frozenset(SPECIAL)) for least in (0, 9)]
    equal = 0
    for ask, wanted in zip(asks, oracle([once(ask) for ask in asks])):
        if set(wanted.new_ids) & set(SPECIAL):
            with pytest.raises(EngineStopped, match="special tokens that are no ends of this request"):
                engine.run([once(ask)])
        else:
            assert engine.run([once(ask)]) == [wanted]
            equal += 1
    assert equal >= 9


def test_the_engine_of_ids_says_which_engine_to_take(served, folder):
    with pytest.raises(S1Error, match="like: transformers"):
        Completions(Server(like="vllm", url=served), folder.name, VOCABULARY)


def test_another_tokenizer_is_noticed(engine, monkeypatch):
    monkeypatch.setattr(textserver, "spoken", lambda tokenizer, ids: "So 1 So 1")
    with pytest.raises(EngineStopped, match="it read 4 tokens, wanted the 7 that were meant; it has another tokenizer"):
        engine.run([once(Continuation([5] * 7, 3, frozenset()))])


def test_another_model_is_refused_in_a_sentence(served):
    engine = FlowEngine(TextServer(Server(like="transformers", url=served, wait=0.01), "another", TOKENIZER, 512))
    with pytest.raises(EngineStopped, match="pinned to"):
        engine.run([once(Continuation(prompt(0), 3, frozenset()))])


def test_a_preset_opens_a_server_of_texts(served, folder):
    preset = load_preset("tiny", ["engine.kind=server", "engine.server={like: transformers, url: " + served + "}"])
    engine, _ = open_engine(preset, folder)
    assert engine.context == preset.engine.context
    assert engine.run([budget_force(prompt(0), forced())]) == oracle([budget_force(prompt(0), forced())])
