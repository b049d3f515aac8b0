"""Replayed schedules: against a slow twin, against bounds that always hold, and against the steps of real engines."""

import heapq
from math import ceil, inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s1book.budget import Force, budget_force
from s1book.config import S1Error
from s1book.engine import READ_AT_ONCE, ScriptedEngine, TransformersEngine, in_rounds
from s1book.simulate import (
    AIME24, MATH500, Machine, Turn, chains, roofline, simulate, simulate_rounds, speed_up, turns_of,
)

from test_engine import sharp_model

TURN = st.builds(Turn, st.integers(1, 12), st.integers(1, 15))
REQUESTS = st.lists(st.lists(TURN, min_size=1, max_size=4).map(tuple), min_size=1, max_size=9)
SLOTS = st.integers(1, 10)


def work(turns):
    return sum(t.writes for t in turns)


def dealt(lengths, slots):
    """Steps if jobs go one after the other to the slot that is free first."""
    free = [0] * slots
    for length in lengths:
        heapq.heappush(free, heapq.heappop(free) + length)
    return max(free)


# ---------------------------------------------------------------- what always holds

@given(REQUESTS)
def test_with_a_slot_for_everybody_the_longest_chain_decides_and_rounds_are_never_faster(requests):
    steps = simulate(requests, len(requests)).steps
    assert steps == max(map(work, requests))
    assert steps <= simulate_rounds(requests, len(requests)).steps


@given(REQUESTS, SLOTS)
def test_steps_are_those_of_jobs_dealt_to_slots(requests, slots):
    assert simulate(requests, slots, by_age=True).steps == dealt(map(work, requests), slots)
    rounds = [[r[k].writes for r in requests if k < len(r)] for k in range(max(map(len, requests)))]
    assert simulate_rounds(requests, slots).steps == sum(dealt(one, slots) for one in rounds)


@given(REQUESTS, SLOTS, st.sampled_from([True, False, None]))
def test_steps_lie_between_the_least_possible_and_graham_s_bound(requests, slots, by_age):
    total, longest, steps = sum(map(work, requests)), max(map(work, requests)), simulate(requests, slots, by_age=by_age).steps
    assert max(ceil(total / slots), longest) <= steps <= total / slots + longest * (slots - 1) / slots


@given(REQUESTS, SLOTS)
def test_more_slots_never_need_more_steps(requests, slots):
    assert simulate(requests, slots + 1, by_age=True).steps <= simulate(requests, slots, by_age=True).steps
    assert simulate_rounds(requests, slots + 1).steps <= simulate_rounds(requests, slots).steps


@given(st.lists(TURN, min_size=1, max_size=5).map(tuple), st.integers(1, 9), SLOTS)
def test_equal_lengths_leave_nothing_to_gain(turns, questions, slots):
    rounds = simulate_rounds([turns] * questions, slots).steps
    assert simulate([turns] * questions, slots, by_age=True).steps == rounds
    if questions <= slots:
        assert simulate([turns] * questions, slots).steps == rounds


@given(st.lists(TURN, min_size=1, max_size=9), SLOTS)
def test_one_turn_each_is_one_round(turns, slots):
    requests = [(turn,) for turn in turns]
    assert simulate(requests, slots).steps == simulate_rounds(requests, slots).steps


def test_with_few_slots_rounds_can_be_lucky():
    """Why the first test asks for a slot for everybody."""
    lucky = [(Turn(5, 2), Turn(1, 1)), (Turn(5, 1), Turn(1, 2)), (Turn(5, 1), Turn(1, 1))]
    assert (simulate(lucky, 2, by_age=True).steps, simulate_rounds(lucky, 2).steps) == (5, 4)


# ---------------------------------------------------------------- against a slow twin that goes step by step

COSTS = Machine(fixed=1.0, per_token=0.25, per_cached=0.03125)  # exact in binary, so that sums are equal


def slowly(requests, slots, machine, by_steps=1):
    """No barrier, memory for everybody, one step after the other."""
    fresh, again, rows, steps, seconds, read = list(range(len(requests))), [], [], 0, 0.0, 0
    while fresh or again or rows:
        while (again or fresh) and len(rows) < slots:
            i, k, held = again.pop(0) if again else (fresh.pop(0), 0, 0)
            turn = requests[i][k]
            read += turn.reads
            seconds += machine.per_token * (turn.reads - 1)
            unread = turn.reads - 1 if turn.reads <= by_steps else 0
            rows.append([i, k, held + turn.reads - unread, turn.writes + unread])
        steps += 1
        seconds += machine.fixed + sum(machine.per_token + machine.per_cached * row[2] for row in rows)
        for row in rows:
            row[2:] = row[2] + 1, row[3] - 1
        over = [row for row in rows if not row[3]]
        rows = [row for row in rows if row[3]]
        again += [(i, k + 1, held) for i, k, held, _ in over if k + 1 < len(requests[i])]
    return steps, seconds, read


@given(REQUESTS, SLOTS, st.sampled_from([1, 4, 20]))
def test_sums_over_many_steps_are_the_steps(requests, slots, by_steps):
    machine = Machine(COSTS.fixed, COSTS.per_token, COSTS.per_cached, by_steps=by_steps)
    hall = simulate(requests, slots, machine, by_age=True)
    assert (hall.steps, hall.seconds, hall.read) == slowly(requests, slots, machine, by_steps)


# ---------------------------------------------------------------- memory

@given(REQUESTS, SLOTS, st.integers(0, 60), st.sampled_from([True, False, None]), st.booleans())
@settings(max_examples=300)
def test_scarce_memory_loses_no_token_and_never_reads_less(requests, slots, spare, by_age, rounds):
    longest = max(sum(t.reads + t.writes for t in turns) for turns in requests)
    machine = Machine(per_token=1.0, pool=longest + 1 + spare)
    def run(m):
        return simulate_rounds(requests, slots, m) if rounds else simulate(requests, slots, m, by_age)
    tight, free = run(machine), run(Machine(per_token=1.0))
    assert tight.wrote == free.wrote == sum(map(work, requests))
    assert tight.read >= free.read == sum(t.reads for turns in requests for t in turns)
    assert tight.held == 0 and tight.spare == sum(tight.kept.values()) <= machine.pool
    assert free.preempted == 0


def test_a_beginning_that_was_forgotten_is_read_again():
    """Two chains, one slot, memory for one of them: in rounds each pushes the other out."""
    requests = [(Turn(10, 5), Turn(1, 5))] * 2
    assert simulate_rounds(requests, 1, Machine(pool=22)).read > 22 + 15
    assert simulate(requests, 1, Machine(pool=22)).read == 22
    assert simulate_rounds(requests, 1, Machine(), keeps=False).read == 2 * (10 + 16)


def test_continuations_first_keep_what_they_need():
    machine = Machine(pool=100)
    requests = [(Turn(20, 10), Turn(1, 10))] * 12
    assert simulate(requests, 2, machine).read == simulate(requests, 2, machine, by_age=True).read == 12 * 21
    assert simulate(requests, 2, machine, by_age=False).read > 1.5 * 12 * 21


def test_the_order_of_coming_wins_where_nothing_is_forgotten():
    """A long chain that comes last begins earlier, and memory for all makes that free."""
    requests = [(Turn(9, 5), Turn(1, 5))] * 6 + [(Turn(9, 20), Turn(1, 20))]
    ample, scarce = Machine(pool=1000), Machine(pool=60)
    assert simulate(requests, 2, ample).steps == simulate(requests, 2, ample, by_age=False).steps
    assert simulate(requests, 2, ample).steps < simulate(requests, 2, ample, by_age=True).steps
    assert simulate(requests, 2, ample).read == sum(t.reads for turns in requests for t in turns)
    assert simulate(requests, 2, scarce).read < simulate(requests, 2, scarce, by_age=False).read


def test_memory_is_ample_again_when_others_are_over():
    """Four strategies could fill it, three cannot: the second turn of the third goes to the end of the queue."""
    requests = [(Turn(3, 1),), (Turn(3, 6),), (Turn(1, 3), Turn(2, 2), Turn(4, 4)), (Turn(2, 9),)]
    steps = [simulate(requests, 2, Machine(pool=75), by_age).steps for by_age in (None, False, True)]
    assert steps == [13, 13, 15]


def test_a_row_that_was_put_back_goes_on():
    """Both enter, the memory cannot hold both to their ends, and the later one waits."""
    hall = simulate([(Turn(5, 20),), (Turn(5, 20),)], 2, Machine(pool=34))
    assert hall.preempted == 1 and hall.wrote == 40 and 20 < hall.steps < 40


def test_whoever_is_put_back_is_the_youngest():
    """Served by their age, second turns keep more of what was read than served by nothing but their being second."""
    requests = [(Turn(6, 11), Turn(5, 5), Turn(1, 8)), (Turn(2, 3), Turn(2, 8))]
    hall = simulate(requests, 3, Machine(pool=22), by_age=True)
    assert (hall.preempted, hall.read, hall.steps) == (1, 31, 29)


def test_who_enters_leaves_room_for_others_to_grow():
    """A twentieth stays free: with 94 tokens the second waits; with 96 it enters, and is put back. Alone one may have all."""
    requests = [(Turn(40, 9),), (Turn(48, 9),)]
    together, apart = (simulate(requests, 2, Machine(pool=pool)) for pool in (96, 94))
    assert together.preempted == 1 and (apart.steps, apart.preempted, apart.read) == (18, 0, 88)
    assert simulate([(Turn(90, 3),)], 2, Machine(pool=94)).steps == 3


@pytest.mark.parametrize("requests, slots", [([(Turn(1, 1),)], 0), ([(Turn(0, 1),)], 1), ([(Turn(1, 0),)], 1)])
def test_nonsense_is_refused(requests, slots):
    for way in (simulate, simulate_rounds):
        with pytest.raises(S1Error, match="wanted at least one of each"):
            way(requests, slots)


def test_nobody_asks():
    assert simulate([], 3).steps == simulate_rounds([], 3).steps == 0


# ---------------------------------------------------------------- real engines

FORCE = dict(max_answer=6, stop_ids=frozenset({1, 2}), answer_stops=frozenset({1, 2, 3, 4, 5, 6, 7}), open_answer=(3,),
             final_answer=(4, 5), newline=(6,), line_ends=frozenset({9}))
PROMPTS = [[10 + i, 20 + i, 30, 40 + i, 50, 60, 70, 80, 11, 12][:9 + i % 2] for i in range(20)]


@pytest.fixture(scope="module")
def model():
    return sharp_model()


def once(ask):
    return (yield [ask])[0]


def strategies(waits, wait_ids, maximum):
    return [budget_force(p, Force(max_thinking=maximum if i % 5 else maximum // 3, ignore_end=waits, wait_ids=wait_ids, **FORCE))
            for i, p in enumerate(PROMPTS)]


@pytest.mark.parametrize("waits, wait_ids, maximum, slots", [
    (0, (7,), 80, 20), (1, (7,), 80, 20), (2, (7, 8), 60, 20), (4, (7, 8, 9), 60, 20), (2, (7, 8), 60, 5), (4, (7,), 80, 1), (2, (7,), 0, 20),
    (1, (), 80, 7), (1, (7, 8) * 5, 80, 20)])
def test_our_engine_takes_the_replayed_steps(model, waits, wait_ids, maximum, slots):
    engine, counted = TransformersEngine(model, slots), 0
    def answer(asks):
        nonlocal counted
        replies = engine.run([once(ask) for ask in asks])
        counted += engine.stats.steps
        return replies
    results = engine.run(strategies(waits, wait_ids, maximum))
    free = engine.stats.steps
    assert in_rounds(answer, strategies(waits, wait_ids, maximum)) == results
    turns, ours = [turns_of(len(p), r) for p, r in zip(PROMPTS, results)], Machine(by_steps=READ_AT_ONCE)
    assert free == simulate(turns, slots, ours, by_age=True).steps
    assert counted == simulate_rounds(turns, slots, ours, keeps=False).steps


@pytest.mark.parametrize("maximum, asks", [(20, 3), (12, 3), (3, 2), (0, 1)])
def test_turns_are_what_was_asked(maximum, asks):
    log = ScriptedEngine(lambda ids: 1 if len(ids) % 7 == 0 else 30)
    force = Force(max_thinking=maximum, ignore_end=1, wait_ids=(7, 8), **FORCE)
    [result] = log.run([budget_force([5] * 9, force)])
    asked, known = [], 0
    for ask, reply in log.log:
        asked.append(Turn(len(ask.ids) - known, len(reply.new_ids) + (reply.stop_id is not None)))
        known = len(ask.ids) + len(reply.new_ids) - (reply.stop_id is None)
    assert list(turns_of(9, result)) == asked and len(asked) == asks


# ---------------------------------------------------------------- the machine that we do not have

def test_the_roofline_by_hand():
    machine = roofline(8)
    assert machine.fixed == pytest.approx(2 * 32.76e9 / (8 * 0.7 * 3.35e12) + 128 * 12e-6 + 3e-3)
    assert machine.per_token == pytest.approx(2 * 32.76e9 / (8 * 0.5 * 989e12))
    assert machine.per_cached == pytest.approx(2 * 64 * 8 * 128 * 2 / (8 * 0.7 * 3.35e12))
    assert machine.pool == pytest.approx((0.9 * 640e9 - 65.52e9) / 262144, abs=1)
    assert roofline(8, wide=4).per_token / machine.per_token == pytest.approx(989 / 67)
    with pytest.raises(S1Error, match="66 GB: found 1 GPUs .*memory|66 GB: found 1 GPUs with 70 GB"):
        roofline(1, memory=70e9)


def test_drawn_lengths_have_the_means_that_were_asked_for():
    requests = [turns for seed in range(20) for turns in chains(MATH500, 2, seed)]
    mean = sum(r[0].writes for r in requests) / len(requests)
    assert mean == pytest.approx(MATH500.first, rel=0.05)
    assert all(sum(t.writes for t in r[:-1]) <= MATH500.maximum for r in requests)


@pytest.mark.parametrize("habit", [MATH500, AIME24])
@pytest.mark.parametrize("machine", [roofline(8), roofline(2), roofline(8, wide=4)], ids=["8 bf16", "2 bf16", "8 fp32"])
def test_simulated_runs_without_a_barrier_are_faster(habit, machine):
    found = speed_up(habit, machine, 2, seeds=2)
    assert 1 < found["min"] <= found["median"] <= found["max"] < 5 and found["steps"] < 1
    assert machine.pool < inf
