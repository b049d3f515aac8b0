"""What only a real vLLM can show: requests in scarce memory, ids beyond the tokenizer, LoRA, two engines, a killed server."""

import json
import os
import signal
from dataclasses import replace

import pytest

from engines import CONTEXT, HAS_VLLM, VOCABULARY, folder, make, oracle, script

if not HAS_VLLM:
    pytest.skip("vLLM is not installed; make test-vllm", allow_module_level=True)

from s1book.backends import EngineStopped, open_vllm
from s1book.config import S1Error, load_preset
from s1book.engine import Continuation, FlowEngine, Sampling, TransformersEngine, in_rounds, open_engine

from test_conformance import forced, prompt
from test_engine import sharp_model
from s1book.budget import budget_force


def once(ask):
    return (yield [ask])[0]


def long(i):
    [a] = yield [Continuation(prompt(i), 60, frozenset({1}))]
    [b] = yield [Continuation(prompt(i) + a.new_ids + [5, 6], 60, frozenset({1}), min_new_tokens=1)]
    return a, b


def test_requests_are_really_preempted_and_no_token_changes(monkeypatch):
    from vllm.v1.core.sched.scheduler import Scheduler

    real, preempted = Scheduler._preempt_request, []
    monkeypatch.setattr(Scheduler, "_preempt_request",
                        lambda *a, **named: (preempted.append(a[1].request_id), real(*a, **named))[1])
    assert make("tight vllm").run(long(i) for i in range(9)) == oracle(long(i) for i in range(9))
    assert preempted, "the memory of this engine should be too small"


def test_continuations_keep_their_blocks_in_scarce_memory():
    results, stats = make("tight vllm").run(long(i) for i in range(12)), make("tight vllm").stats
    kept = sum(len(prompt(i)) + len(a.new_ids) for i, (a, b) in enumerate(results))
    assert stats.reused > 0.8 * (kept - 12 * 32), "all but a part of a block of each, nearly"


def test_ids_beyond_the_tokenizer_are_never_written():
    backend = make("vllm").backend
    few = FlowEngine(replace(backend, vocabulary=20))
    replies = few.run([once(Continuation([5 + i], 40, frozenset(), Sampling(2.0, i))) for i in range(5)])
    assert max(max(r.new_ids) for r in replies) < 20 and len({tuple(r.new_ids) for r in replies}) == 5


def test_draws_follow_the_softmax():
    import torch

    n, stops = 2000, frozenset()
    counts = torch.zeros(VOCABULARY)
    for reply in make("vllm").run([once(Continuation(prompt(0), 1, stops, Sampling(1.5, seed))) for seed in range(n)]):
        counts[reply.new_ids[0]] += 1
    from engines import model
    with torch.inference_mode():
        wanted = (model()(torch.tensor([prompt(0)])).logits[0, -1] / 1.5).softmax(-1) * n
    big = wanted > 5
    chi2 = ((counts - wanted)[big] ** 2 / wanted[big]).sum().item()
    assert chi2 < big.sum().item() + 5 * (2 * big.sum().item()) ** 0.5


def test_the_real_scheduler_failing_is_a_sentence_and_the_rest_goes_on(monkeypatch):
    from vllm.v1.core.sched.scheduler import Scheduler

    real, left = Scheduler.schedule, [30]
    def schedule(self, *rest, **named):
        left[0] -= 1
        if not left[0]:
            raise MemoryError("no blocks")
        return real(self, *rest, **named)
    monkeypatch.setattr(Scheduler, "schedule", schedule)
    with pytest.raises(EngineStopped, match="of 9 .*no blocks") as caught:
        make("vllm").run([long(i) for i in range(9)])
    monkeypatch.undo()
    assert make("transformers").run(caught.value.books) == oracle(long(i) for i in range(9))


def test_heads_that_cannot_run_here_are_refused(tmp_path):
    sharp_model().config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"hidden_size": 36, "num_attention_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(S1Error, match="heads of 18, wanted one of"):
        open_vllm(tmp_path, 90, device="cpu")


def test_a_server_that_is_killed_is_a_sentence_and_its_work_goes_on_elsewhere():
    """Late, because the server of all tests is gone afterwards."""
    import engines

    engine, told = make("vllm server"), []
    def kill(i, result):
        told.append(i)
        if len(told) == 2:
            os.killpg(engines.SERVERS[-1].pid, signal.SIGKILL)
    engine.backend.server = engine.backend.server.model_copy(update={"tries": 2, "concurrency": 3})
    with pytest.raises(EngineStopped, match="of 9 .*Connection") as caught:
        engine.run([long(i) for i in range(9)], kill)
    assert make("transformers").run(caught.value.books) == oracle(long(i) for i in range(9)) and sorted(told) == list(range(9))


# ---------------------------------------------------------------- other engines, at the end
# vLLM in this process keeps its groups of processes in globals: when one engine ends, the others do.

def test_a_preset_opens_vllm_and_budget_forcing_agrees_with_our_engine():
    def run(kind):
        engine, _ = open_engine(load_preset("tiny", [f"engine.kind={kind}"]), "data/tiny/base")
        return engine.run([budget_force(prompt(i), forced(ignore_end=i % 3)) for i in range(24)])
    assert run("vllm") == run("transformers")


@pytest.mark.parametrize("slots", [24, 6])
def test_vllm_takes_the_replayed_steps(slots):
    """Without a barrier and in rounds; every unread beginning is read within the step that writes after it."""
    from s1book.simulate import simulate, simulate_rounds, turns_of

    engine, counted = FlowEngine(open_vllm(folder(), VOCABULARY, CONTEXT, "cpu", dtype="float32", max_num_seqs=slots)), 0
    def answer(asks):
        nonlocal counted
        replies = engine.run([once(ask) for ask in asks])
        counted += engine.stats.steps
        return replies
    def strategies():
        return [budget_force(prompt(i), forced(ignore_end=2, max_thinking=40 + 5 * i % 60)) for i in range(24)]
    results = engine.run(strategies())
    free = engine.stats.steps
    assert in_rounds(answer, strategies()) == results
    turns = [turns_of(len(prompt(i)), result) for i, result in enumerate(results)]
    assert (free, counted) == (simulate(turns, slots).steps, simulate_rounds(turns, slots).steps)


def test_vllm_stands_behind_the_server():
    """Streaming and not, from a thread that did not load the model; the tokens are our own engine's."""
    import openai
    from s1book.budget import whole_answer
    from s1book.config import Run
    from s1book.serve import close, listening, make_app, open_service
    from s1book.wire import ChatRequest, settle

    asked = dict(model="sft", messages=[{"role": "user", "content": "How many r in 1r 2a 3s 4p 5b 6e 7r 8r 9y ?"}])
    thinking = {"thinking": {"ignore_end": 2, "max_tokens": 200}}
    service = open_service(Run.open("tiny", ["engine.kind=vllm", "engine.slots=4"]))
    with listening(make_app(service)) as url:
        client = openai.OpenAI(base_url=url, api_key="x", max_retries=0)
        assert [m.max_model_len for m in client.models.list()] == [service.live.engine.context]
        whole = client.chat.completions.create(**asked, extra_body=thinking)
        deltas = [c.choices[0].delta for c in client.chat.completions.create(**asked, stream=True, extra_body=thinking)
                  if c.choices]
    close(service.live)
    said = whole.choices[0].message
    assert "".join(getattr(d, "reasoning_content", None) or "" for d in deltas) == said.reasoning_content
    assert "".join(d.content or "" for d in deltas) == said.content and len(deltas) > 10
    engine, tokenizer = open_engine(load_preset("tiny"), Run.open("tiny").read("sft"))
    ids, force = settle(service.model, ChatRequest(**asked, **thinking))
    [twin] = engine.run([budget_force(ids, force)])
    assert said.reasoning_content == tokenizer.decode(twin.trace.ids) and whole.thinking["ignored_ends"] == 2
    assert said.content == tokenizer.decode(whole_answer(force, twin))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A model with heads that need no widening, a LoRA adapter for it, and both as one model."""
    import torch
    from safetensors.torch import save_file
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    target = tmp_path_factory.mktemp("lora")
    config = Qwen2Config(vocab_size=96, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                         num_key_value_heads=2, max_position_embeddings=256, eos_token_id=None, bos_token_id=None)
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.3)
    model.save_pretrained(target / "base")
    tensors = {}
    for part in ("q_proj", "v_proj"):
        weight = getattr(model.model.layers[0].self_attn, part).weight
        a, b = torch.randn(8, 64) * 0.3, torch.randn(64, 8) * 0.3
        name = f"base_model.model.model.layers.0.self_attn.{part}"
        tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
        with torch.no_grad():
            weight += 2.0 * b @ a
    (target / "adapter").mkdir()
    save_file(tensors, target / "adapter" / "adapter_model.safetensors")
    (target / "adapter" / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(target / "base"), "r": 8,
        "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "bias": "none", "lora_dropout": 0.0}))
    return target, model


def test_an_adapter_works_while_thinking_and_while_answering(adapter):
    target, merged = adapter
    def run(engine):
        return engine.run(two(i) for i in range(5))
    def two(i):
        [a] = yield [Continuation([5, 6 + i], 30, frozenset({1}), phase="thinking")]
        [b] = yield [Continuation([5, 6 + i] + a.new_ids + [9], 30, frozenset({1}), phase="answer")]
        return a, b
    small = dict(dtype="float32", max_num_seqs=8)
    with_adapter = run(FlowEngine(open_vllm(target / "adapter", 96, device="cpu", **small)))
    without = run(FlowEngine(open_vllm(target / "base", 96, device="cpu", **small)))
    assert with_adapter == run(TransformersEngine(merged)), "the merged model writes the same"
    assert all(a != c and b != d for (a, b), (c, d) in zip(with_adapter, without)), "and the base alone does not"
