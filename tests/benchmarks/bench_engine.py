"""How much faster than rounds of generate, and than one request at a time? Ratios, interleaved.

Run it alone on a machine: `OMP_NUM_THREADS=1 python tests/benchmarks/bench_engine.py`. Single times
scatter with whatever else runs; ratios inside one repetition do so less, hence their median and range.
Every way must give the same tokens, or the script ends with an error; where two logits are nearer than
float32 can tell, both tokens are right, and such ties are counted.
"""

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging

from s1book.budget import Force, budget_force, make_force, rounds, sweep
from s1book.config import Run, read_jsonl
from s1book.engine import Continued, TransformersEngine, open_engine
from s1book.format import prompt_ids


def random_model(hidden, layers):
    """Random, but with sharp attention: greedy text is varied, and lengths have a long tail."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=1000, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=1024,
        bos_token_id=None, eos_token_id=None, pad_token_id=None))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.15)
    return model.eval()


def made_up(questions, hidden, layers):
    """A model, prompts and a budget for which nothing has to be trained."""
    stops = frozenset(range(20))
    force = Force(max_thinking=300, max_answer=8, stop_ids=stops, answer_stops=stops, open_answer=(30, 31, 32),
                  final_answer=(33,), newline=(34,), line_ends=frozenset({34}), wait_ids=(35,))
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(30, 50, (questions,), generator=generator).tolist()
    prompts = [torch.randint(40, 1000, (n,), generator=generator).tolist() for n in lengths]
    return random_model(hidden, layers), prompts, force


def trained(folder, questions):
    """The course's own model on a benchmark."""
    run = Run.open("tiny")
    engine, tokenizer = open_engine(run.preset, folder)
    rows = read_jsonl(run.read(f"benchmarks/{run.preset.evaluate.benchmarks[1]}.jsonl"))[:questions]
    prompts = [prompt_ids(tokenizer, row["question"]) for row in rows]
    return engine.model, prompts, make_force(tokenizer, run.preset.budget)


def with_generate(model, batch):
    """A function that answers requests with transformers' generate, `batch` at a time."""
    def one_batch(asks):
        width, most = max(len(a.ids) for a in asks), max(a.max_new_tokens for a in asks)
        fill = [width - len(a.ids) for a in asks]
        ids = torch.tensor([[0] * f + a.ids for f, a in zip(fill, asks)])
        mask = torch.tensor([[0] * f + [1] * len(a.ids) for f, a in zip(fill, asks)])
        out = model.generate(ids, attention_mask=mask, max_new_tokens=most, do_sample=False,
                             min_new_tokens=asks[0].min_new_tokens or None, pad_token_id=0,
                             eos_token_id=sorted(asks[0].stop_ids))[:, width:].tolist()
        for ask, new in zip(asks, out):
            end = next((k for k, t in enumerate(new[:ask.max_new_tokens]) if t in ask.stop_ids), None)
            yield Continued(new[:ask.max_new_tokens if end is None else end], None if end is None else new[end])

    return lambda asks: [r for i in range(0, len(asks), batch) for r in one_batch(asks[i:i + batch])]


def seconds(action):
    """A result and the time it took."""
    began = time.perf_counter()
    return action(), time.perf_counter() - began


def size(results):
    """Tokens of thinking and answers."""
    return sum(len(r.trace.ids) + len(r.answer_ids) for r in results)


def ties(model, prompts, ours, theirs):
    """How many results differ, each because of a tie of the two best logits; anything else is an error."""
    found = 0
    for prompt, a, b in zip(prompts, ours, theirs):
        if a == b:
            continue
        a, b = (prompt + r.trace.ids + [*r.closing, *r.answer_ids] for r in (a, b))
        k = next(k for k, (x, y) in enumerate(zip(a, b)) if x != y)
        with torch.inference_mode():
            best, second = model(torch.tensor([a[:k]])).logits[0, -1].topk(2).values.tolist()
        assert best - second < 1e-3, f"the ways give different tokens: logits {best} and {second}"
        found += 1
    return found


def compare(model, prompts, force, slots, repetitions, slow):
    """Times of all ways, interleaved; the same tokens everywhere."""
    engine, batched, single = TransformersEngine(model, slots), with_generate(model, slots), with_generate(model, 1)
    few = prompts[:slow]
    times = {"engine": [], "rounds": [], "one by one": []}
    for _ in range(repetitions):
        ours, t = seconds(lambda: engine.run([budget_force(p, force) for p in prompts]))
        tokens, steps = engine.stats.generated, engine.stats.steps
        times["engine"].append(t)
        theirs, t = seconds(lambda: rounds(batched, prompts, force))
        times["rounds"].append(t)
        readme, t = seconds(lambda: rounds(single, few, force))
        times["one by one"].append(t * size(ours) / size(readme))  # for as many tokens as the others
        tied = ties(model, prompts, ours, theirs) + ties(model, prompts, ours, readme)
    ratio = {f"over {way}": [b / a for a, b in zip(times["engine"], times[way])] for way in ("rounds", "one by one")}
    return {"waits": force.ignore_end, "tokens": tokens, "steps": steps, "ties": tied,
            "tokens/s": round(tokens / statistics.median(times["engine"]))} | {
                name: [round(f(values), 2) for f in (min, statistics.median, max)] for name, values in ratio.items()}


def main():
    """Print one line of JSON per number of Waits, then one for a sweep against separate runs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, help="a fine-tuned tiny model; without it a random one")
    parser.add_argument("--questions", type=int, default=96)
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--few", type=int, default=6, help="questions that are also answered one by one")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    args = parser.parse_args()
    logging.disable_progress_bar()
    what = trained(args.model, args.questions) if args.model else made_up(args.questions, args.hidden, args.layers)
    model, prompts, force = what
    print(json.dumps({"threads": torch.get_num_threads(), "questions": len(prompts), "slots": args.slots,
                      "parameters": sum(p.numel() for p in model.parameters())}))
    for n in (0, 1, 2, 4):
        line = compare(model, prompts, replace(force, ignore_end=n), args.slots, args.repetitions, args.few)
        print(json.dumps(line), flush=True)
    engine, maxima, waits = TransformersEngine(model, args.slots), (0, 8, 16, 32, 64, 128), (0, 1, 2, 4)
    apart = [replace(force, max_thinking=m) for m in maxima] + [replace(force, ignore_end=n) for n in waits]
    one, t_one = seconds(lambda: engine.run([sweep(p, force, maxima, waits) for p in prompts]))
    tokens = engine.stats.generated
    many, t_many = seconds(lambda: engine.run([budget_force(p, f) for p in prompts for f in apart]))
    flat = [prompt for prompt in prompts for _ in apart]
    assert ties(model, flat, [r for result in one for r in result.values()], many) < len(prompts) / 10
    print(json.dumps({"sweep": len(apart), "tokens": tokens, "tokens apart": engine.stats.generated,
                      "faster": round(t_many / t_one, 2), "tokens/s": round(tokens / t_one)}))


if __name__ == "__main__":
    main()
