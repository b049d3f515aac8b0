"""The count of memory and money: exact where it can be, near what was measured and published."""

import os
import subprocess
import sys
from dataclasses import fields

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s1book.cli import main
from s1book.ablations import cut_arm, make_arm
from s1book.config import load_preset, parameters, project_root, training_flops
from s1book.cost import (
    PAPER_POOL, ablation_plan, activation_bytes, gathered_bytes, host_bytes, knob, logit_bytes, memory, plan, plan_lines, state_bytes,
    train_flops, train_seconds,
)

H100 = load_preset("h100")


def test_a_sharded_mixed_training_costs_16_bytes_a_weight():
    held = memory(H100)
    state = held.weights + held.gradients + held.optimiser
    assert state * 16 == pytest.approx(16 * parameters(H100.model.shape))
    assert held.total == sum(getattr(held, f.name) for f in fields(held))
    alone = load_preset("h100", ["sft.sharding=none"])  # without FSDP accelerate raises nothing
    assert state_bytes(alone, 100) == 200


@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(1, 60_000), layers=st.integers(2, 80))
def test_recomputation_never_needs_more(tokens, layers):
    shape = H100.model.shape.model_copy(update={"layers": layers})
    assert activation_bytes(shape, tokens, True, 2) < activation_bytes(shape, tokens, False, 2)


@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(4096, 60_000), vocabulary=st.integers(32768, 300_000))
def test_tiles_bound_the_logits(tokens, vocabulary):
    assert logit_bytes(vocabulary, tokens, 2, False) == logit_bytes(32768, 4096, 2, False)


@pytest.mark.parametrize("changes, wanted", [
    ([], ""),
    (["sft.gradient_checkpointing=false"], "sft.gradient_checkpointing=true"),
    (["sft.batch_size=64", "sft.micro_batch_size=4"], "sft.micro_batch_size=1"),
    (["launch.nodes=1", "launch.memory_gb=86"], "sft.max_length=1"),
    (["launch.nodes=1"], "more GPUs"),
])
def test_the_knob_makes_it_fit(changes, wanted):
    preset = load_preset("h100", changes)
    found = knob(preset)
    assert found.startswith(wanted) and bool(found) == bool(wanted)
    if found.startswith("sft."):
        mended = load_preset("h100", [*changes, found.split(" ")[0]])
        assert memory(mended).total <= mended.launch.memory_gb * 1e9


def test_hours_and_the_evaluation_by_hand():
    assert train_seconds(H100) == pytest.approx(train_flops(H100) / (16 * 989e12 * 0.25))
    short = load_preset("h100", ["sft.max_length=5000", "sft.gradient_checkpointing=false"])
    assert train_flops(short) == 6 * 32_762_757_120 * 1000 * 5 * 5000
    few = load_preset("h100", ["budget.maxima=[500, 16000]", "budget.waits=[0, 2]",
                               "sft.mean_length=4000"])
    stages = {s.name: s for s in plan(few)}
    assert stages["evaluation"].tokens == 728 * (500 + 4000 + 4000 + 4000 * 1.2)
    hours = stages["training"].flops / (16 * 989e12 * 0.25) / 3600
    assert stages["training"].hours == pytest.approx(hours)
    assert stages["training"].dollars == pytest.approx(hours * 16 * 3)


def test_flops_and_dollars_by_hand():
    assert train_flops(H100) == 8 * 32_762_757_120 * 1000 * 5 * 9280
    bought = load_preset("h100", ["teacher.kind=openai", "grade.grader=judge"])
    both = load_preset("h100", ["grade.grader=judge", "features.domain=llm"])
    assert {s.name: s.tokens for s in plan(both)}["judge"] == 2 * 1000 * 200
    lines = {s.name: s for s in plan(bought)}
    server = bought.teacher.server
    assert lines["traces"].dollars == pytest.approx(1000 * server.mean_out * server.usd_out / 1e6)
    assert lines["judge"].dollars == pytest.approx(1000 * 200 * 15 / 1e6)
    assert {s.name: s.dollars for s in plan(H100)}["traces"] == 0
    assert all(s.dollars == 0 for s in plan(load_preset("tiny")))


def test_a_machine_holds_a_float32_copy_for_each_of_its_processes():
    assert host_bytes(H100) == 8 * 4 * 32_762_757_120
    assert host_bytes(load_preset("h100", ["sft.sharding=none"])) == 0 == host_bytes(load_preset("tiny"))
    said = [line for line in plan_lines(H100, "h100") if line.startswith("CPU memory")]
    assert said == ["CPU memory of one machine while the weights are handed out: 1,048 GB"]


def test_each_difficulty_model_is_counted_by_its_own_size():
    base, small, tried = 32_762_757_120, 7_615_616_512, 1000 * 640
    for change, weights in (([], base + small), (["model.small_weights=0"], 2 * base)):
        stage = {s.name: s for s in plan(load_preset("h100", change))}["difficulty"]
        assert (stage.tokens, stage.flops) == (2 * tried, 2 * weights * tried)


def test_recorded_peaks_are_what_the_count_says_today():
    import runpy

    bench = runpy.run_path(str(project_root() / "tests" / "benchmarks" / "bench_memory.py"))
    table = pd.read_csv(project_root() / "data" / "reference" / "memory.csv")
    assert table["size"].nunique() == 3 and len(table) == 6
    for row in table.itertuples():
        today = memory(bench["preset"](row.size, row.recompute)).total / 1e6
        assert today == pytest.approx(row.predicted_mb, abs=0.1)
        assert today == pytest.approx(row.measured_mb, rel=0.15)


def test_what_is_gathered_by_hand():
    block = 2 * 5120 * (5120 + 1024) + 3 * 5120 * 27648  # attention, MLP
    assert gathered_bytes(H100.model.shape) == 2 * (2 * 152064 * 5120 + 3 * block)
    assert memory(H100).gathered > 0 == memory(load_preset("h100", ["sft.sharding=none"])).gathered


@pytest.mark.parametrize("command", ["sft", "run"])
def test_a_preset_that_cannot_fit_is_one_sentence_and_no_training(command, tmp_path, capsys):
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "model.safetensors").write_bytes(b"of an earlier training")
    for preset, change, fix in (("tiny", "launch.memory_gb=0.01", "a machine with more memory"),
                                ("h100", "launch.nodes=1", "more GPUs"),
                                ("h100", "sft.gradient_checkpointing=false", "sft.gradient_ch")):
        with pytest.raises(SystemExit) as end:
            main([command, "--preset", preset, "--set", change, "--folder", str(tmp_path)])
        said = capsys.readouterr().err
        assert end.value.code == 1 and said.count("\n") == 1 and f"; try {fix}" in said
        assert f"Preset {preset} cannot run here: training memory: found" in said
    assert [p.name for p in tmp_path.rglob("*")] == ["sft", "model.safetensors"]


ALONE = """
import sys
from s1book.config import load_preset
from s1book.cost import measured_peak, memory
preset = load_preset("tiny", [
    "model.shape.layers=6", "model.shape.hidden=256", "model.shape.intermediate=1024",
    "model.shape.kv_heads=2", "model.shape.head_dim=64", "model.shape.vocabulary=2048",
    "sft.max_length=192", "sft.batch_size=2", "sft.micro_batch_size=1", "sft.epochs=1",
    f"sft.gradient_checkpointing={sys.argv[1]}"])
print("peak", memory(preset).total, measured_peak(preset, sys.argv[2]))
"""


@pytest.mark.parametrize("recompute", ["false", "true"])
def test_a_real_training_holds_what_was_counted(recompute):  # alone: old memory confuses a count
    done = subprocess.run(
        [sys.executable, "-c", ALONE, recompute, str(project_root() / "data/tiny/base")],
        capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(x for x in done.stdout.splitlines() if x.startswith("peak"))
    predicted, peak = map(float, line.split()[1:])
    assert predicted == pytest.approx(peak, rel=0.15)


@pytest.mark.parametrize("name", ["tiny", "h100"])
def test_the_command_prints_every_part_and_stage(name, capsys):
    with pytest.raises(SystemExit) as end:
        main(["plan", "--preset", name])
    out = capsys.readouterr().out
    assert end.value.code == 0 and out.rstrip("\n") == "\n".join(plan_lines(load_preset(name), name))
    for word in ("weights", "gradients", "optimiser", "activations", "logits", "fits",
                 "traces", "difficulty", "training", "evaluation"):
        assert word in out


POOL = ["pool.source=s1-sources", f"pool.size={PAPER_POOL}", "teacher.kind=openai", "features.domain=llm"]


def stages_of(preset):
    return {stage.name: stage for stage in ablation_plan(preset)}


@pytest.mark.parametrize("preset", [
    load_preset("h100", POOL), load_preset("h100", [*POOL, "ablations.full_epochs=0"]), load_preset("tiny"),
    load_preset("tiny", ["ablations.sets=[longest]", "ablations.cut=0.5", "sft.gradient_checkpointing=true"]), H100,
], ids=["pool", "equal steps", "tiny", "few", "h100"])
def test_the_arms_cost_what_chapter_17_trains_and_asks(preset):
    """Sums over real arms, made of a pool of the preset's size, by the functions of chapter 17."""
    pool = [{"question_hash": f"{i:05}", "domain": "d", "trace_tokens": i} for i in range(preset.pool.size)]
    sets = preset.ablations.sets if preset.pool.size > preset.select.size else ()
    arms = [make_arm(pool, kind, preset) for kind in sets]
    arms += [cut_arm(pool[:preset.select.size], 10, preset)] if preset.ablations.cut else []
    length, shape, twice = preset.sft.mean_length, preset.model.shape, preset.sft.gradient_checkpointing
    flops = sum(training_flops(shape, length * len(arm.rows), arm.preset.sft.epochs, twice) for arm in arms)
    stages = stages_of(preset)
    trained = [stage for name, stage in stages.items() if name.startswith("train ")]
    assert [stage.name for stage in trained] == [f"train {arm.name}" for arm in arms]
    assert sum(stage.flops for stage in trained) == pytest.approx(flops)
    assert sum(stage.tokens for stage in trained) == sum(
        length * len(arm.rows) * arm.preset.sft.epochs for arm in arms)
    asked = sum(stage.tokens for name, stage in stages.items() if name.startswith("ask "))
    words = len(preset.ablations.strings)   # each is thought on for a fifth, out of one decode
    assert asked == pytest.approx(728 * length * (len(arms) + 1 + words * 0.2))
    for stage in stages.values():
        gpu_hours = stage.hours * preset.launch.devices
        speed = preset.launch.peak_tflops * 1e12 * stage.mfu * 3600
        assert gpu_hours == pytest.approx(stage.flops / speed)
        assert stage.dollars == pytest.approx(gpu_hours * preset.launch.usd_per_gpu_hour)


def test_a_preset_without_a_choice_says_what_the_other_sets_would_cost():
    """Nothing is left out in silence, and what is not run is not in the sum of what is."""
    text = "\n".join(plan_lines(H100, "h100"))
    own, other = text.split("Other sets need a pool to choose from")
    assert [name for name in stages_of(H100) if name.startswith("train")] == ["train cut"]
    assert "train cut" in own and "train full" not in own and f"{PAPER_POOL:,} questions" in other
    whole = stages_of(load_preset("h100", POOL))
    for kind in ("random", "diverse", "longest", "full"):
        for verb in ("train", "ask"):
            assert f"{verb} {kind}" in other and f"{whole[f'{verb} {kind}'].dollars:.2f}" in other
    hours = sum(s.hours for n, s in whole.items() if n.split()[1] in ("random", "diverse", "longest", "full"))
    assert f"({16 * hours:,.0f} GPU-hours)" in other
    tiny = "\n".join(plan_lines(load_preset("tiny"), "tiny"))
    assert "train full" in tiny and "Other sets need" not in tiny


def test_answers_end_with_the_thinking_that_is_allowed():
    short = load_preset("h100", ["budget.max_thinking_tokens=5000", "budget.maxima=[500]"])
    assert stages_of(short)["ask cut"].tokens == stages_of(short)["ask strings"].tokens == 728 * 5000


def test_launch_on_a_laptop_is_one_sentence(capsys):
    with pytest.raises(SystemExit) as end:
        main(["launch", "--preset", "tiny"])
    assert end.value.code == 1 and "launch.gpus_per_node: found 0" in capsys.readouterr().err
