"""How fast is budget forcing? Ratios against rounds, one request at a time, and no forcing at all.

Run it alone on a machine, with the Python of `.venv-vllm` for the sections vllm and over. Give the section vllm
every core, as vLLM takes them by itself, and the others one: `OMP_NUM_THREADS=1 python tests/benchmarks/bench_forcing.py`.
The ways take turns in every repetition, because single times scatter with whatever else runs; ratios inside one
repetition do so less, hence their least, median and greatest. Every way must write the same tokens, or the script
says where they part and ends with an error. A target that is missed is said to be missed and is no error.

What vLLM saves over rounds are steps, and how much time that is hangs on what a step costs apart from its rows. On
eight H100s, simulated, that is as much as 480 rows, on a CPU with 2 layers of width 64 as much as 45. So the sections
vllm and over take a deep and narrow model: 48 layers, as Qwen2.5-14B has, of width 32, the smallest head of vLLM's
kernels for a CPU. More layers are more calls, whatever the rows. A shallow one (--shape 64 2) needs longer turns to
hide what a request more costs vLLM and us, about 0.4 ms, and then saves less time over rounds.

How many steps rounds need hangs on --seed. Of the deep model's draws 0 to 36, all that were looked at, three meet both
targets for steps: 0, 7 and 27. The median of the first 15 needs 42.6 and 31.2 % of rounds' steps at n = 2 and 4. Long
draws press hardest on memory: 0 meets the bound for tokens computed again there, 7 does not. The depth, too, was
chosen after looking: with 24 layers forcing costs 2 to 4 % more than free generation at n = 4, about the target.

The section over asks what forcing costs over free generation of equal lengths. That is less than this machine
drifts between two runs, so the two run abreast, a step of one after a step of the other (with one thread: two
engines of two threads on two cores took twice the time).
"""

import argparse
import math
import os
import random
import statistics
import sys
import tempfile
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Semaphore

import torch
from transformers import LogitsProcessor, Qwen2Config, Qwen2ForCausalLM, StoppingCriteria
from transformers.utils import logging

from s1book.backends import open_vllm
from s1book.budget import Force, budget_force, make_force, sweep
from s1book.config import Run, read_jsonl
from s1book.engine import Continuation, Continued, FlowEngine, TransformersEngine, in_rounds, open_engine
from s1book.format import prompt_ids

VOCABULARY, CONTEXT, BLOCK = 512, 1024, 32
Work = namedtuple("Work", "model prompts forces")
Row = namedtuple("Row", "section waits what values target good")


# ---------------------------------------------------------------- what is run

def random_model(hidden, layers):
    """Random, but with sharp attention: greedy text is varied, and no two logits are near each other."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 32, num_key_value_heads=hidden // 32, max_position_embeddings=CONTEXT,
        bos_token_id=None, eos_token_id=None, pad_token_id=None))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 1.8 / math.sqrt(hidden))
    return model.eval()


def long_tailed(requests, hidden, layers, seed):
    """Every request has ends of its own, so many that its turns take a log-normal number of tokens, 50 on average."""
    dice, prompts, forces, sigma = random.Random(seed), [], [], 0.9
    for i in range(requests):
        mean = dice.lognormvariate(math.log(50) - sigma ** 2 / 2, sigma)
        ends = frozenset(dice.sample(range(10, VOCABULARY), max(1, round(VOCABULARY / max(4, mean)))))
        forces.append(Force(max_thinking=400 if i % 8 else 50, max_answer=dice.randint(8, 40), stop_ids=ends, answer_stops=ends,
                            open_answer=(3, 4), final_answer=(5, 6), newline=(), line_ends=frozenset(), wait_ids=(7, 8)))
        prompts.append([dice.randrange(10, VOCABULARY) for _ in range(dice.randint(16, 48))])
    return Work(random_model(hidden, layers), prompts, forces)


def trained(folder, requests):
    """The course's own model on a benchmark."""
    run = Run.open("tiny")
    engine, tokenizer = open_engine(run.preset, folder)
    rows = read_jsonl(run.read(f"benchmarks/{run.preset.evaluate.benchmarks[1]}.jsonl"))[:requests]
    prompts = [prompt_ids(tokenizer, row["question"]) for row in rows]
    return Work(engine.model, prompts, [make_force(tokenizer, run.preset.budget)] * len(prompts))


def forced(work, waits):
    """The strategies that are compared."""
    return [budget_force(p, replace(f, ignore_end=waits)) for p, f in zip(work.prompts, work.forces)]


def once(ask):
    """A strategy of one request."""
    return (yield [ask])[0]


def unforced(work, results):
    """Strategies that write as many tokens, in one go."""
    return [once(Continuation(p, len(said(p, r)) - len(p), frozenset())) for p, r in zip(work.prompts, results)]


def said(prompt, result):
    """All ids of a result."""
    return prompt + result.trace.ids + [*result.closing, *result.answer_ids]


def same(work, results, way, others):
    """End with an error unless two ways wrote the same; the nearest logits tell a tie from a mistake."""
    for i, (prompt, a, b) in enumerate(zip(work.prompts, results, others)):
        if a != b:
            a, b = said(prompt, a), said(prompt, b)
            k = next((k for k, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
            with torch.inference_mode():
                best, second = work.model(torch.tensor([a[:k]])).logits[0, -1].topk(2).values.tolist()
            sys.exit(f"{way}: request {i} differs from the engine's at id {k}, where the two best logits are {best - second:.2g} apart")


# ---------------------------------------------------------------- generate of transformers, with requests of their own

@dataclass
class OwnEnds(StoppingCriteria):
    """Ends every row at its own stops and its own limit; without the attribute, generate does not fill rows that are done."""
    stops_RV: torch.Tensor
    limits_R: torch.Tensor
    width: int
    eos_token_id = 0

    def __call__(self, ids_RT, scores, **kwargs):
        rows = torch.arange(len(ids_RT))
        return self.stops_RV[rows, ids_RT[:, -1]] | (ids_RT.shape[1] - self.width >= self.limits_R)


@dataclass
class OwnMinimum(LogitsProcessor):
    """Holds every row's own stops back until its own minimum."""
    stops_RV: torch.Tensor
    minima_R: torch.Tensor
    width: int

    def __call__(self, ids_RT, scores_RV):
        early_R = ids_RT.shape[1] - self.width < self.minima_R
        return scores_RV.masked_fill(early_R[:, None] & self.stops_RV, float("-inf")) if early_R.any() else scores_RV


def generate(model, asks):
    """One batch, filled up on the left, as the documentation of transformers shows it."""
    width = max(len(a.ids) for a in asks)
    fill = [width - len(a.ids) for a in asks]
    ids = torch.tensor([[0] * f + a.ids for f, a in zip(fill, asks)])
    mask = torch.tensor([[0] * f + [1] * len(a.ids) for f, a in zip(fill, asks)])
    stops_RV = torch.zeros(len(asks), model.config.vocab_size, dtype=torch.bool)
    for row, ask in zip(stops_RV, asks):
        row[list(ask.stop_ids)] = True
    limits, minima = (torch.tensor([getattr(a, name) for a in asks]) for name in ("max_new_tokens", "min_new_tokens"))
    out = model.generate(ids, attention_mask=mask, max_new_tokens=int(limits.max()), do_sample=False, pad_token_id=0,
                         stopping_criteria=[OwnEnds(stops_RV, limits, width)],
                         logits_processor=[OwnMinimum(stops_RV, minima, width)])[:, width:].tolist()
    for ask, new in zip(asks, out):
        end = next((k for k, t in enumerate(new[:ask.max_new_tokens]) if t in ask.stop_ids), None)
        yield Continued(new[:ask.max_new_tokens if end is None else end], None if end is None else new[end])


def in_batches(model, size):
    """A function that answers requests, so many at a time."""
    return lambda asks: [reply for i in range(0, len(asks), size) for reply in generate(model, asks[i:i + size])]


# ---------------------------------------------------------------- vLLM, and what its scheduler counts

class Counted:
    """A vLLM engine that answers strategies, or batches for rounds; counts steps, and tokens that were computed."""

    def __init__(self, folder, model, **options):
        longest = model.config.max_position_embeddings
        backend = open_vllm(folder, model.config.vocab_size, longest, "cpu", dtype="float32", **options)
        self.engine, self.steps, self.computed, self.preempted = FlowEngine(backend), 0, 0, 0
        scheduler = backend.engine.engine_core.engine_core.scheduler
        schedule, preempt = scheduler.schedule, scheduler._preempt_request

        def counting(*rest, **named):
            output = schedule(*rest, **named)
            self.computed += output.total_num_scheduled_tokens
            return output

        def preempting(*rest, **named):
            self.preempted += 1
            return preempt(*rest, **named)

        scheduler.schedule, scheduler._preempt_request = counting, preempting

    def fresh(self):
        """Forget what earlier runs left: counts, and blocks that would be found again."""
        self.steps = self.computed = self.preempted = 0
        assert self.engine.backend.engine.reset_prefix_cache()
        return self

    def run(self, strategies):
        """No barrier."""
        results = self.engine.run(strategies)
        self.steps += self.engine.stats.steps
        return results

    def rounds(self, strategies):
        """The same requests, but all of a round before any of the next."""
        return in_rounds(lambda asks: self.run(once(ask) for ask in asks), strategies)


def needed(prompts, results):
    """Tokens that must be computed once: all but an answer's last token, if the limit ended the answer."""
    return sum(len(said(p, r)) - (not r.answer_ended) for p, r in zip(prompts, results))


# ---------------------------------------------------------------- measuring

CLOCK = ["wall"]  # the one that the command line chose
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def seconds(action):
    """A result and the time it took."""
    began = CLOCKS[CLOCK[0]]()
    return action(), CLOCKS[CLOCK[0]]() - began


def ratios(above, below):
    """One of each repetition."""
    return [a / b for a, b in zip(above, below)]


def vllm_rows(section, counted, work, waits, repetitions, targets):
    """Ours and rounds take turns."""
    times, share, more = {"ours": [], "rounds": []}, [], {"ours": [], "rounds": []}
    counted.run(forced(work, 0))  # kernels are chosen at their first call
    for _ in range(repetitions):
        ours, t = seconds(lambda: counted.fresh().run(forced(work, waits)))
        times["ours"].append(t)
        steps, minimum = counted.steps, needed(work.prompts, ours)
        more["ours"].append((counted.computed - minimum) / len(ours))
        theirs, t = seconds(lambda: counted.fresh().rounds(forced(work, waits)))
        times["rounds"].append(t)
        more["rounds"].append((counted.computed - minimum) / len(ours))
        share.append(steps / counted.steps)
        same(work, ours, "rounds", theirs)
    print(f"# {section}, n = {waits}: {steps} steps against {counted.steps} of rounds; seconds "
          + ", ".join(f"{name} {statistics.median(values):.1f}" for name, values in times.items()), flush=True)
    bound = (waits + 1) * (BLOCK / 2 + len(work.forces[0].wait_ids))
    yield Row(section, waits, "times as fast as rounds", ratios(times["rounds"], times["ours"]), targets.get("speed"), ">=")
    yield Row(section, waits, "steps, share of rounds'", share, targets.get("steps"), "<=")
    yield Row(section, waits, "tokens computed again, per request", more["ours"], bound, "<=")
    yield Row(section, waits, "the same in rounds", more["rounds"], None, "")


def abreast(pair, runs):
    """Results and seconds of two runs that change places at every step: what slows the machine for a moment slows both."""
    for counted in pair:
        counted.fresh()
    gates, alive, spent, clock = [Semaphore(1), Semaphore(0)], {0, 1}, [0.0, 0.0], CLOCKS[CLOCK[0]]

    def go(me):
        backend, step = pair[me].engine.backend, pair[me].engine.backend.step
        gates[me].acquire()
        began = clock()

        def stepping():
            nonlocal began
            pieces = step()
            spent[me] += clock() - began
            if len(alive) == 2:
                gates[1 - me].release()
                gates[me].acquire()
            began = clock()
            return pieces

        backend.step = stepping
        try:
            return pair[me].run(runs[me])
        finally:
            spent[me] += clock() - began
            del backend.step
            alive.remove(me)
            gates[1 - me].release()

    with ThreadPoolExecutor(2) as both:
        return list(both.map(go, (0, 1))), spent


def over(work, args):
    """What forcing costs over free generation of equal lengths; both change engines, and who goes first, from pair to pair."""
    work.model.save_pretrained(args.scratch)
    pair = [Counted(args.scratch, work.model, max_num_seqs=args.requests) for _ in "ab"]
    for counted in pair:
        counted.run(forced(work, 0))
    for waits in args.waits:
        ours, times = pair[0].fresh().run(forced(work, waits)), {"ours": [], "free": []}
        for repetition in range(args.pairs):
            runs = [forced(work, waits), unforced(work, ours)]
            order = 1 if repetition % 2 == 0 else -1
            results, spent = abreast(pair, runs[::order])
            same(work, ours, "a run abreast", results[::order][0])
            for name, t in zip(times, spent[::order]):
                times[name].append(t)
        requests = sum(len(r.trace.parts) // 2 + 2 for r in ours)
        print(f"# over, n = {waits}: {requests} requests against {len(ours)} of free generation; seconds "
              + ", ".join(f"{name} {statistics.median(values):.1f}" for name, values in times.items()), flush=True)
        yield Row("over", waits, "time over free generation", [r - 1 for r in ratios(*times.values())],
                  0.03 if waits else None, "<=")


def vllm(work, args):
    """All rows of the section."""
    work.model.save_pretrained(args.scratch)
    wide = Counted(args.scratch, work.model, max_num_seqs=args.requests)
    targets = {0: {}, 1: {}, 2: dict(speed=1.6, steps=0.42), 4: dict(speed=2.1, steps=0.29)}
    for waits in args.waits:
        yield from vllm_rows("vllm", wide, work, waits, args.repetitions, targets.get(waits, {}))
    few = args.requests // 4
    narrow = Counted(args.scratch, work.model, max_num_seqs=few)
    yield from vllm_rows(f"vllm, {few} slots", narrow, work, 2, args.repetitions, dict(speed=1.4))
    tight = Counted(args.scratch, work.model, max_num_seqs=few, num_gpu_blocks_override=3520 // BLOCK + 1)  # vLLM never uses the first
    yield from vllm_rows(f"vllm, {few} slots, 3,520 ids of memory", tight, work, 2, args.repetitions, {})


def transformers(work, args):
    """All rows of the section."""
    engine = TransformersEngine(work.model, args.slots)
    batched, single = in_batches(work.model, args.slots), in_batches(work.model, 1)
    for waits in args.waits:
        times = {"engine": [], "rounds": [], "one at a time": []}
        for _ in range(args.repetitions):
            ours, t = seconds(lambda: engine.run(forced(work, waits)))
            times["engine"].append(t)
            for way, answer in ("rounds", batched), ("one at a time", single):
                theirs, t = seconds(lambda: in_rounds(answer, forced(work, waits)))
                times[way].append(t)
                same(work, ours, way, theirs)
        print(f"# transformers, n = {waits}: {engine.stats.steps} steps, "
              f"{engine.stats.generated / statistics.median(times['engine']):.0f} tokens per second; seconds "
              + ", ".join(f"{name} {statistics.median(values):.1f}" for name, values in times.items()), flush=True)
        for way, target in ("rounds", 4), ("one at a time", 7):
            yield Row(f"transformers, {args.slots} slots", waits, f"times as fast as {way}", ratios(times[way], times["engine"]), target, ">=")


def sweeps(work, args):
    """A whole curve out of one decode, against every setting by a run of its own."""
    engine, maxima, waits, times = TransformersEngine(work.model, args.slots), (0, 8, 16, 32), (0, 1, 2, 4), {"one": [], "apart": []}
    longest = max(waits)
    for _ in range(args.repetitions):
        one, t = seconds(lambda: engine.run([sweep(p, f, maxima, waits) for p, f in zip(work.prompts, work.forces)]))
        times["one"].append(t)
        settings = [replace(f, **change) for f in work.forces
                    for change in [dict(max_thinking=m) for m in maxima] + [dict(ignore_end=n) for n in waits]]
        each = len(settings) // len(work.forces)
        prompts = [p for p in work.prompts for _ in range(each)]
        apart, t = seconds(lambda: engine.run([budget_force(p, f) for p, f in zip(prompts, settings)]))
        times["apart"].append(t)
        same(Work(work.model, prompts, settings), [r for found in one for r in found.values()], "settings apart", apart)
    yield Row("sweep", longest, f"times as fast as {each} settings apart", ratios(times["apart"], times["one"]), None, "")


HEAD = f"{'section':38} {'n':>2}  {'what':36} {'min':>7} {'median':>7} {'max':>7}  {'of':>2}  target"


def line(row):
    """Least, median and greatest of all repetitions, and whether the median meets the target."""
    least, middle, most = (f(row.values) for f in (min, statistics.median, max))
    met = "" if row.target is None else f"{row.good} {row.target:g} " + (
        "met" if (middle >= row.target if row.good == ">=" else middle <= row.target) else "MISSED")
    return f"{row.section:38} {row.waits:2}  {row.what:36} {least:7.3f} {middle:7.3f} {most:7.3f}  {len(row.values):2}  {met}"


SECTIONS = {"transformers": transformers, "vllm": vllm, "over": over, "sweep": sweeps}
SHALLOW, DEEP = (64, 2), (32, 48)  # hidden size and layers
SHAPES = {"transformers": SHALLOW, "vllm": DEEP, "over": DEEP, "sweep": SHALLOW}


def main():
    """Print a table of ratios and targets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", default=["transformers", "sweep"], help=f"of {', '.join(SECTIONS)}; vllm and over need .venv-vllm")
    parser.add_argument("--model", type=Path, help="a fine-tuned tiny model, on questions of the tiny world, instead of the random one")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--slots", type=int, default=64, help="rows at a time in the sections transformers and sweep")
    parser.add_argument("--waits", type=int, nargs="*", default=[0, 1, 2, 4])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of prompts and lengths; how many steps rounds need hangs on it")
    parser.add_argument("--pairs", type=int, default=9, help="runs abreast in the section over")
    parser.add_argument("--shape", type=int, nargs=2, metavar=("HIDDEN", "LAYERS"),
                        help=f"of the random model; {', '.join(f'{name} {h} {l}' for name, (h, l) in SHAPES.items())}")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: of this process, for a machine that others use too")
    args = parser.parse_args()
    CLOCK[0] = args.clock
    if wrong := set(args.sections) - set(SECTIONS):
        parser.error(f"sections: found {', '.join(sorted(wrong))}, wanted some of {', '.join(SECTIONS)}")
    logging.disable_progress_bar()
    for name in args.sections:
        work = (trained(args.model, args.requests) if args.model else
                long_tailed(args.requests, *(args.shape or SHAPES[name]), args.seed))
        print(f"{len(work.prompts)} requests, {sum(p.numel() for p in work.model.parameters()):,} parameters, "
              f"{torch.get_num_threads()} thread(s), {os.cpu_count()} cores", HEAD, sep="\n")
        with tempfile.TemporaryDirectory(prefix="s1book-") as args.scratch:
            for row in SECTIONS[name](work, args):
                print(line(row), flush=True)


if __name__ == "__main__":
    main()
