"""Fine-tuning: real steps on a tiny model; interrupted ones end with the same weights."""

import json
import math
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from s1book.adapters import MissingPackage, base_weights, kernels
from s1book.config import PresetError, S1Error, load_preset
from s1book.forgetting import change
from s1book.format import IGNORE, Sample, save_samples, tokenize_row
from s1book.packing import PER_SAMPLE, packed, register
from s1book.sft import (
    TrainingError,
    accumulation,
    check_batch,
    fine_tune,
    fingerprint,
    last_complete,
    load_samples,
    make_trainer,
    rows_of,
    sample_fault,
    total_steps,
    training_args,
)

EPOCHS, ROWS = 3, 40  # 3 steps an epoch, 9 in all
FEW = ["sft.epochs=3"]


@pytest.fixture
def tokens(tiny_tokenizer, tmp_path):
    """sft_tokens.parquet with 40 samples of different length."""
    rows = [
        {
            "question_hash": f"{i:04x}",
            "question": f"How many r in : {' '.join(f'{j}{c}' for j, c in enumerate(word, 1))} ?",
            "trace": "\n".join(
                ["In ones", *(f"{j}{c} {j % 3}" for j, c in enumerate(word, 1)), "So 1"]
            ),
            "attempt": str(i % 10),
        }
        for i, word in enumerate(["rabe", "pears", "berry", "sap", "essay"] * (ROWS // 5))
    ]
    path = tmp_path / "sft_tokens.parquet"
    save_samples([tokenize_row(tiny_tokenizer, row) for row in rows], path)
    return path


def weights(folder):
    """Every tensor of a saved model."""
    from safetensors.torch import load_file

    return load_file(Path(folder) / "model.safetensors")


def equal(a, b):
    """Whether two models agree in every bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def train(tokens, folder, name, preset=None, callbacks=()):
    """fine_tune with outputs named `name` beside the token file."""
    preset = preset or load_preset("tiny", FEW)
    return fine_tune(
        preset, str(folder), tokens, tokens.parent / name, tokens.parent / f"{name}.csv", callbacks
    )


# -- arithmetic --


def test_the_papers_steps():
    assert total_steps(1000, 16, 5) == 315 == load_preset("h100").steps
    assert (
        total_steps(1, 16, 1) == 1 and total_steps(16, 16, 1) == 1 and total_steps(17, 16, 1) == 2
    )


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 64))
def test_effective_batch_is_exact_or_refused(batch, micro, devices):
    try:
        assert accumulation(batch, micro, devices) * micro * devices == batch
    except TrainingError:
        assert batch % (micro * devices)


def test_batch_refusal_names_what_was_found():
    with pytest.raises(
        TrainingError,
        match=r"found 1 on 32 device\(s\) = 32 samples a pass, wanted a divisor .* 16",
    ):
        accumulation(16, 1, 32)  # where the released script would compute 0 passes
    two_gpus = SimpleNamespace(
        train_batch_size=32, gradient_accumulation_steps=1, world_size=1, n_gpu=2
    )
    with pytest.raises(
        TrainingError, match="effective batch of 32 with 2 GPUs in one process, wanted 16"
    ):
        check_batch(load_preset("tiny"), two_gpus)


# -- training --


def test_the_papers_numbers_reach_the_trainer(tmp_path):
    preset = load_preset("h100")  # its 16 bits and its GPUs cannot be asked for here
    args = training_args(preset.model_copy(update={"device": "cpu", "sft": preset.sft.model_copy(
        update={"bf16": False, "sharding": "none"})}), tmp_path)
    found = (args.learning_rate, args.adam_beta1, args.adam_beta2, args.weight_decay)
    assert found == (1e-5, 0.9, 0.95, 1e-4) and "adamw" in args.optim
    assert args.lr_scheduler_type == "cosine" and args.get_warmup_steps(315) == 16
    assert args.train_batch_size * args.gradient_accumulation_steps == 16
    assert args.num_train_epochs == 5 and args.max_grad_norm == 1 and args.gradient_checkpointing
    assert preset.sft.bf16 and preset.sft.sharding == "fsdp" and preset.sft.max_length == 20000


def test_sharding_says_which_blocks_and_spares_its_own_settings(tmp_path, monkeypatch):
    from s1book.sft import FSDP

    asked = {}
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setattr("trl.SFTConfig", lambda **settings: asked.update(settings))
    training_args(load_preset("h100"), tmp_path)
    assert asked["fsdp"] is True and asked["bf16"] is True and asked["fsdp_config"] == FSDP
    assert asked["fsdp_config"]["transformer_layer_cls_to_wrap"] == ["Qwen2DecoderLayer"]
    asked["fsdp_config"]["added by transformers"] = True
    assert "added by transformers" not in FSDP and asked["gradient_accumulation_steps"] == 1


def test_training_learns_logs_and_saves_whole(tokens, tiny_folder, tiny_tokenizer):
    history = train(tokens, tiny_folder, "sft")
    log = pd.read_csv(tokens.parent / "sft.csv")
    assert list(log.columns) == ["step", "loss", "learning_rate", "grad_norm"]
    assert list(log["step"]) == list(range(1, 10)) and len(log) == total_steps(ROWS, 16, EPOCHS)
    assert log["loss"].iloc[-1] < log["loss"].iloc[0] and (log["grad_norm"] > 0).all()
    assert [h["loss"] for h in history if "loss" in h] == pytest.approx(list(log["loss"]))
    from transformers import AutoModelForCausalLM

    from s1book.format import load_tokenizer

    model = AutoModelForCausalLM.from_pretrained(tokens.parent / "sft")
    assert model.config.use_cache and not equal(
        weights(tokens.parent / "sft"), weights(tiny_folder)
    )
    ids = load_tokenizer(tokens.parent / "sft")("How many r", add_special_tokens=False).input_ids
    assert ids == tiny_tokenizer("How many r", add_special_tokens=False).input_ids
    left = {p.name for p in tokens.parent.iterdir()}
    assert left == {
        "sft",
        "sft.csv",
        "sft_tokens.parquet",
        tiny_folder.name,
    }  # no work folder, nothing unfinished
    for file in (tokens.parent / "sft").iterdir():
        assert str(tokens.parent).encode() not in file.read_bytes(), (
            f"{file.name} holds a path of this machine"
        )


def test_schedule_is_linear_warm_up_and_cosine_to_zero(tokens, tiny_folder):
    preset = load_preset("tiny", [*FEW, "sft.warmup=0.3"])
    rates = [h["learning_rate"] for h in train(tokens, tiny_folder, "sft", preset) if "loss" in h]
    warm, steps, peak = math.ceil(0.3 * 9), 9, preset.sft.learning_rate
    wanted = [
        peak * s / warm
        if s < warm
        else peak * 0.5 * (1 + math.cos(math.pi * (s - warm) / (steps - warm)))
        for s in range(steps)
    ]
    assert rates == pytest.approx(wanted, abs=1e-9)


def plain_losses(folder, batches, preset, steps):
    """The training loop written out: AdamW, clipping, warm-up and cosine."""
    from transformers import AutoModelForCausalLM

    model, sft = AutoModelForCausalLM.from_pretrained(folder, dtype="float32"), preset.sft
    big = [p for p in model.parameters() if p.ndim > 1]
    small = [p for p in model.parameters() if p.ndim == 1]
    optimiser = torch.optim.AdamW(
        [{"params": big, "weight_decay": sft.weight_decay}, {"params": small, "weight_decay": 0.0}],
        betas=sft.betas,
    )
    losses, warm = [], math.ceil(sft.warmup * steps)
    for step, batch in enumerate(batches):
        part = (
            step / warm
            if step < warm
            else 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))
        )
        for group in optimiser.param_groups:
            group["lr"] = sft.learning_rate * part
        logits = model(
            batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        ).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("micro", [2, 1])
def test_twenty_steps_of_trl_are_those_of_the_plain_loop(
    tokens, tiny_folder, tiny_tokenizer, tmp_path, micro
):
    steps = ["sft.epochs=1", "sft.batch_size=2", "sft.micro_batch_size="]
    whole, split = (load_preset("tiny", [*steps[:2], f"{steps[2]}{m}"]) for m in (2, micro))
    samples = load_samples(tokens, len(tiny_tokenizer))
    trainer = make_trainer(whole, str(tiny_folder), samples, tmp_path / "work")
    batches = list(trainer.get_train_dataloader())
    if micro != 2:  # the same batches in two passes each
        trainer = make_trainer(split, str(tiny_folder), samples, tmp_path / "work")
    trainer.train()
    losses = [h["loss"] for h in trainer.state.log_history if "loss" in h]
    plain = plain_losses(tiny_folder, batches, whole, trainer.state.max_steps)
    assert len(plain) == 20 and losses == pytest.approx(plain, abs=1e-5)
    assert all(
        (b["labels"][b["attention_mask"] == 0] == IGNORE).all() for b in batches
    )  # pads carry no loss


TWO = """
import sys
from pathlib import Path
from s1book.config import load_preset
from s1book.sft import fine_tune
preset = load_preset("tiny", ["sft.epochs=3", "sft.micro_batch_size=8"])
fine_tune(preset, sys.argv[1], Path(sys.argv[2]), Path("two"), Path("two.csv"))
"""


def test_two_processes_take_the_steps_of_one(tokens, tiny_folder):
    folder = tokens.parent
    # Two whole batches: a short last one would be filled up with repeated samples for process two.
    pd.read_parquet(tokens).head(32).to_parquet(tokens)
    train(tokens, tiny_folder, "one")
    (folder / "two.py").write_text(TWO)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launch, "two.py", str(tiny_folder), str(tokens)],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (pd.read_csv(folder / f"{name}.csv") for name in ("one", "two"))
    pd.testing.assert_frame_equal(one, two, rtol=1e-5)
    a, b = weights(folder / "one"), weights(folder / "two")
    assert max((a[name] - b[name]).abs().max() for name in a) < 1e-4
    assert not (folder / "two_work").exists() and not list(folder.glob("two/*.bin"))


# -- interruption --

CHILD = """
import os, signal, sys
from pathlib import Path
from transformers import TrainerCallback
from s1book.config import load_preset
from s1book.sft import fine_tune
class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)
preset, tokens = load_preset("tiny", ["sft.epochs=3"]), Path(sys.argv[2])
fine_tune(preset, sys.argv[1], tokens, Path("sft"), Path("sft.csv"), (Kill(),))
"""


def test_killed_training_ends_with_the_same_weights(tokens, tiny_folder):
    folder, step = tokens.parent, random.randint(4, 8)  # the first checkpoint is written after 3
    train(tokens, tiny_folder, "through")
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(tiny_folder), str(tokens), str(step)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert child.returncode == -signal.SIGKILL, child.stderr[-2000:]
    assert (
        not (folder / "sft").exists() and not (folder / "sft.csv").exists()
    )  # never a half-trained model
    steps = []

    class Count(__import__("transformers").TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            steps.append(state.global_step)

    train(tokens, tiny_folder, "sft", callbacks=(Count(),))
    # It went on after the last whole epoch and did not start anew.
    assert steps == list(range(4 if step <= 6 else 7, 10)), f"killed at step {step}"
    assert equal(weights(folder / "sft"), weights(folder / "through"))
    assert (folder / "sft.csv").read_bytes() == (folder / "through.csv").read_bytes()


def test_a_finished_training_is_kept_and_another_is_not(tokens, tiny_folder, capsys):
    first = train(tokens, tiny_folder, "sft")
    model = tokens.parent / "sft" / "model.safetensors"
    written = model.stat().st_mtime_ns
    again = train(tokens, tiny_folder, "sft")
    assert "holds this very training, finished" in capsys.readouterr().out
    assert model.stat().st_mtime_ns == written
    steps = [{k: h[k] for k in again[0]} for h in first if "loss" in h]
    assert [{k: float(v) for k, v in h.items()} for h in steps] == again
    train(tokens, tiny_folder, "sft", load_preset("tiny", [*FEW, "seed=1"]))
    assert model.stat().st_mtime_ns != written
    written = model.stat().st_mtime_ns
    (tokens.parent / "sft.csv").unlink()  # what is not whole does not count as finished
    train(tokens, tiny_folder, "sft", load_preset("tiny", [*FEW, "seed=1"]))
    assert model.stat().st_mtime_ns != written and (tokens.parent / "sft.csv").exists()


def test_sharding_with_one_process_is_refused(tokens, tiny_folder):
    preset = load_preset("tiny", FEW)
    alone = preset.model_copy(update={"sft": preset.sft.model_copy(update={"sharding": "fsdp"})})
    with pytest.raises(TrainingError, match=r"found NO, wanted FSDP .* s1book launch prints"):
        train(tokens, tiny_folder, "sft", alone)
    assert not (tokens.parent / "sft").exists()


def test_only_whole_checkpoints_count(tmp_path):
    assert last_complete(tmp_path / "none") is None
    for step, state in (
        (3, '{"global_step": 3}'),
        (6, '{"global_step": 6}'),
        (9, '{"global'),
        (12, None),
    ):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert last_complete(tmp_path).name == "checkpoint-6"


def test_fingerprint_names_everything_that_matters(tokens, tiny_folder, tiny_tokenizer):
    preset, name = (
        load_preset("tiny", FEW),
        fingerprint(load_preset("tiny", FEW), str(tiny_folder), tokens),
    )
    assert fingerprint(preset, str(tiny_folder), tokens) == name
    others = [
        fingerprint(load_preset("tiny", [*FEW, change]), str(tiny_folder), tokens)
        for change in ("seed=1", "sft.learning_rate=3e-4", "sft.weight_decay=0.0")
    ]
    save_samples([Sample("x", [5, 6], [IGNORE, 6])], tokens)
    others.append(fingerprint(preset, str(tiny_folder), tokens))
    from conftest import make_model

    make_model(len(tiny_tokenizer), seed=1).save_pretrained(tiny_folder)
    others.append(fingerprint(preset, str(tiny_folder), tokens))
    assert len({name, *others}) == 6


def test_same_seed_same_weights_other_seed_other_weights(tokens, tiny_folder):
    for name, change in (("a", "seed=0"), ("b", "seed=0"), ("c", "seed=1")):
        train(tokens, tiny_folder, name, load_preset("tiny", ["sft.epochs=1", change]))
    a, b, c = (weights(tokens.parent / name) for name in "abc")
    assert equal(a, b) and not equal(a, c)


# -- bad input --


def test_nan_stops_names_its_samples_and_saves_nothing(tokens, tiny_folder):
    train(tokens, tiny_folder, "sft")
    before = (tokens.parent / "sft" / "model.safetensors").read_bytes()
    wild = load_preset("tiny", [*FEW, "sft.learning_rate=1e30", "sft.warmup=0.0"])
    with pytest.raises(TrainingError, match=r"stopped at step \d+: loss: found") as caught:
        train(tokens, tiny_folder, "sft", wild)
    said = str(caught.value)
    named = said.split("Samples of the step: ")[1].split(". A smaller")[0].split(", ")
    samples = load_samples(tokens, 10**6)
    batches = list(
        make_trainer(wild, str(tiny_folder), samples, tokens.parent / "x").get_train_dataloader()
    )
    step = int(said.split("step ")[1].split(":")[0])
    by_ids = {tuple(r["input_ids"]): r["question_hash"] for r in samples}
    assert set(named) == {by_ids[row] for row in rows_of(batches[step - 1])}
    assert (
        tokens.parent / "sft" / "model.safetensors"
    ).read_bytes() == before  # the good model stays


@pytest.mark.parametrize(
    ("ids", "labels", "message"),
    [
        ([1, 2], [IGNORE], "2 tokens and 1 labels"),
        ([], [], "0 tokens"),
        ([1, 50], [IGNORE, 50], "token 50, wanted less than 50"),
        ([1, 2], [IGNORE, IGNORE], "no label to learn from"),
        ([1, 2], [IGNORE, 3], "label that is not its token"),
        ([1, 2], [1, 2], ""),
    ],
)
def test_faulty_samples(ids, labels, message, tmp_path):
    assert message in sample_fault({"input_ids": ids, "labels": labels}, 50)
    save_samples([Sample("00aa", ids, labels)], tmp_path / "t.parquet")
    if message:
        with pytest.raises(TrainingError, match=f"t.parquet, sample 00aa: found .*{message}"):
            load_samples(tmp_path / "t.parquet", 50)
    else:
        assert load_samples(tmp_path / "t.parquet", 50).column_names == [
            "question_hash",
            "input_ids",
            "labels",
        ]


def test_files_that_are_not_samples(tokens, tiny_folder):
    for content in (b"", b"PAR1 nonsense PAR1", tokens.read_bytes()[:-50]):
        broken = tokens.parent / "broken.parquet"
        broken.write_bytes(content)
        with pytest.raises(TrainingError, match="broken.parquet: found no readable table"):
            load_samples(broken, 50)
    pd.DataFrame({"question_hash": ["a"]}).to_parquet(tokens)
    with pytest.raises(TrainingError, match="found no readable table"):
        train(tokens, tiny_folder, "sft")
    save_samples([], tokens)
    with pytest.raises(TrainingError, match="found no sample"):
        load_samples(tokens, 50)
    assert not (tokens.parent / "sft").exists()


def test_samples_of_another_tokenizer_are_refused_before_any_work(tokens, tiny_folder):
    save_samples([Sample("00aa", [1, 9999], [IGNORE, 9999])], tokens)
    with pytest.raises(TrainingError, match="token 9999, wanted less than"):
        train(tokens, tiny_folder, "sft")
    assert not (tokens.parent / "sft_work").exists()


def losses(tokens, folder, name, *changes):
    """The losses of a training with some settings changed."""
    train(tokens, folder, name, load_preset("tiny", ["sft.epochs=2", *changes]))
    return list(pd.read_csv(tokens.parent / f"{name}.csv")["loss"])


def test_packing_and_checkpointing_change_no_loss(tokens, tiny_folder):
    plain = losses(tokens, tiny_folder, "plain")
    for name, changes in {
        "packed": ["sft.packing=true"],
        "packed4": ["sft.packing=true", "sft.micro_batch_size=4"],
        "recomputed": ["sft.gradient_checkpointing=true"],
    }.items():
        assert losses(tokens, tiny_folder, name, *changes) == pytest.approx(plain, abs=1e-5), name


def largest_leak(model, samples, row):
    """The largest distance between the logits of samples in a row and alone."""
    with torch.no_grad():
        alone = [
            model(input_ids=torch.tensor([s]), use_cache=False).logits
            for s in samples
        ]
        return (model(**row).logits - torch.cat(alone, 1)).abs().max().item()


@pytest.mark.parametrize("attention", ["eager", "sdpa", PER_SAMPLE])
def test_a_packed_sample_sees_no_other(tiny_folder, attention):
    from transformers import AutoModelForCausalLM

    register()
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, attn_implementation=attention).eval()
    with torch.no_grad():  # with its small random weights attention would hardly matter
        for weight in model.parameters():
            weight.mul_(8.0 if weight.ndim > 1 else 1.0)
    samples = [[5, 6, 7, 8], [9], [7, 7, 4, 5, 6, 9, 11]]
    assert largest_leak(model, samples, packed(samples)) < 1e-4
    row = packed(samples)
    if attention == PER_SAMPLE:
        bounds = torch.tensor([0, row["input_ids"].shape[1]], dtype=torch.int32)
        trap = row | {"cu_seq_lens_q": bounds}
    else:
        trap = {"input_ids": row["input_ids"], "position_ids": row["position_ids"]}
        trap |= {"use_cache": True}
    assert largest_leak(model, samples, trap) > 1e-2


def test_lora_trains_adapters_and_saves_an_ordinary_model(tokens, tiny_folder):
    pytest.importorskip("peft")
    changes = ["sft.lora_rank=4", "sft.learning_rate=1e-2"]
    log = losses(tokens, tiny_folder, "lora", *changes)
    assert log[-1] < log[0]
    names = {p.name for p in (tokens.parent / "lora").iterdir()}
    assert "model.safetensors" in names and not [n for n in names if "adapter" in n]
    tuned, base = weights(tokens.parent / "lora"), weights(tiny_folder)
    assert tuned.keys() == base.keys() and not equal(tuned, base)
    changed = {name for name in base if not torch.equal(tuned[name], base[name])}
    assert changed and all("_proj" in name for name in changed)  # embeddings and norms stay


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["sft.four_bit=true", "sft.lora_rank=8"], "false on device cpu"),
        (["sft.kernels=fast"], "plain or auto on device cpu"),
        (["sft.micro_batch_size=3"], "a multiple of micro_batch_size"),
    ],
)
def test_settings_that_cannot_work_here_are_refused(changes, message):
    with pytest.raises(PresetError, match=message):
        load_preset("tiny", changes)


def test_a_missing_package_is_refused_before_any_work(tokens, tiny_folder, monkeypatch):
    monkeypatch.setattr("s1book.adapters.importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match="sft.lora_rank: found 8 but no package peft"):
        train(tokens, tiny_folder, "sft", load_preset("tiny", ["sft.lora_rank=8"]))
    assert not (tokens.parent / "sft").exists()
    with pytest.raises(MissingPackage, match="no package bitsandbytes"):
        four = ["sft.four_bit=true", "sft.lora_rank=8", "sft.sharding=none"]
        base_weights(load_preset("h100", four), str(tiny_folder), "sdpa")


@pytest.mark.parametrize(("package", "advice"), [
    ("flash_attn", "pip install flash-attn --no-build-isolation"),
    ("liger_kernel", r"pip install 's1book\[adapters\]'")])
def test_fast_kernels_name_what_is_missing_and_what_installs_it(package, advice, monkeypatch):
    monkeypatch.setattr("s1book.adapters.importlib.util.find_spec",
                        lambda name: None if name == package else object())
    fast = load_preset("h100", ["sft.kernels=fast"])
    with pytest.raises(MissingPackage, match=f"found 'fast' but no package {package}.*{advice}"):
        kernels(fast)


def test_a_gpu_takes_the_fast_kernels_it_finds(monkeypatch, capsys):
    there = {"flash_attn", "liger_kernel"}
    monkeypatch.setattr("s1book.adapters.importlib.util.find_spec",
                        lambda name: object() if name in there else None)
    auto, packing = load_preset("h100"), "sft.packing=true"
    assert kernels(auto) == ("flash_attention_2", True)
    assert "attention flash_attention_2; Liger is used." in capsys.readouterr().out
    assert kernels(load_preset("h100", ["sft.kernels=plain"])) == ("sdpa", False)
    assert kernels(load_preset("h100", ["sft.kernels=plain", packing])) == (PER_SAMPLE, False)
    there.remove("flash_attn")
    assert kernels(load_preset("h100", [packing])) == (PER_SAMPLE, True)


def test_kernels_auto_announces_what_it_takes(capsys):
    assert kernels(load_preset("tiny", ["sft.kernels=auto"])) == ("sdpa", False)
    assert "attention sdpa; Liger is not used" in capsys.readouterr().out
    assert kernels(load_preset("tiny")) == ("sdpa", False) and not capsys.readouterr().out


def test_a_diverging_loss_stops_although_it_is_finite(tokens, tiny_folder):
    wild = load_preset("tiny", [*FEW, "sft.learning_rate=30", "sft.warmup=0.0"])
    with pytest.raises(TrainingError, match=r"loss: found \d+.*at most 9\.6"):
        train(tokens, tiny_folder, "sft", wild)
    assert not (tokens.parent / "sft").exists()


def test_another_model_and_no_model_are_refused(tokens, tiny_folder):
    rows = pd.read_parquet(tokens)
    save_samples(
        [Sample(r.question_hash, [*r.input_ids[:-1], 7], [*r.labels[:-1], 7])
         for r in rows.itertuples()], tokens)  # another tokenizer's number for the end
    with pytest.raises(TrainingError, match="found no sample that ends with <|im_end|>"):
        train(tokens, tiny_folder, "sft")
    with pytest.raises(TrainingError, match="found no language model in"):
        train(tokens, tokens.parent / "nowhere", "sft")
    assert {p.name for p in tokens.parent.iterdir()} == {tokens.name, tiny_folder.name}


def test_samples_of_another_tokenizer_are_refused_by_its_mark(tokens, tiny_folder, tiny_tokenizer):
    train(tokens, tiny_folder, "sft", load_preset("tiny", ["sft.epochs=1"]))  # no mark, no refusal
    rows = pd.read_parquet(tokens)
    samples = [Sample(r.question_hash, [*r.input_ids], [*r.labels]) for r in rows.itertuples()]
    save_samples(samples, tokens, tiny_tokenizer)
    train(tokens, tiny_folder, "good", load_preset("tiny", ["sft.epochs=1"]))
    before = (tokens.parent / "sft" / "model.safetensors").read_bytes()
    file = tiny_folder / "tokenizer.json"  # as many words and the same end, but two change places
    values = json.loads(file.read_text())
    vocab = values["model"]["vocab"]
    vocab["How"], vocab["many"] = vocab["many"], vocab["How"]
    file.write_text(json.dumps(values))
    with pytest.raises(TrainingError, match=r"found samples of tokenizer \w{16}, wanted those of"):
        train(tokens, tiny_folder, "sft")
    assert (tokens.parent / "sft" / "model.safetensors").read_bytes() == before
    assert not (tokens.parent / "sft_work").exists()


@pytest.mark.parametrize(("change", "message"), [
    ({"hidden_size": 16}, "found sizes that contradict each other"),
    ({"num_hidden_layers": 2}, r"found no model.layers.1\.")])
def test_weights_of_another_model_are_refused(tokens, tiny_folder, change, message):
    file = tiny_folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change | {"layer_types": None}))
    with pytest.raises(S1Error, match=message + ".* wanted the weights that belong"):
        train(tokens, tiny_folder, "sft")
    assert not (tokens.parent / "sft").exists()


def test_weights_that_are_tied_are_not_missing(tiny_tokenizer, tmp_path):
    from conftest import make_model
    from safetensors.torch import load_file

    model = make_model(len(tiny_tokenizer))
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    again = base_weights(load_preset("tiny"), str(tmp_path / "tied"), "sdpa")
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_paired_change_against_scipy():
    from scipy import stats

    before, after = [0.5, 0.25, 1.0, 0.75, 0.9] * 40, [0.4, 0.5, 1.0, 0.5, 0.8] * 40
    mean, low, high = change(before, after)
    differences = [b - a for a, b in zip(before, after)]
    wanted = stats.norm.interval(0.95, loc=mean, scale=stats.sem(differences))
    assert mean == pytest.approx(-0.04) and (low, high) == pytest.approx(wanted, abs=1e-5)
    with pytest.raises(ValueError):
        change(before, after[:-1])


def test_the_command_and_the_chapter_call_one_function(monkeypatch, tmp_path, capsys):
    from s1book.cli import main

    seen = []
    monkeypatch.setattr("s1book.sft.train_run", lambda run: seen.append(run) or [{"loss": 2.0}])
    with pytest.raises(SystemExit) as ended:
        main(["sft", "--folder", str(tmp_path), "--set", "seed=3", "--no-checks"])
    assert ended.value.code in (0, None) and seen[0].preset.seed == 3
    assert "1 steps, loss 2.000 -> 2.000" in capsys.readouterr().out
    cells = json.loads(Path("nbs/09_sft.ipynb").read_text())["cells"]
    assert any("train_run(run)" in "".join(c["source"]) for c in cells if c["cell_type"] == "code")


def test_the_command_trains_and_says_where(tokens, tiny_folder, tmp_path, monkeypatch, capsys):
    from s1book.cli import main
    from s1book.config import Run

    monkeypatch.setattr(Run, "model", lambda self, name: str(tiny_folder))
    (tmp_path / "run").mkdir()
    tokens.rename(tmp_path / "run" / "sft_tokens.parquet")
    with pytest.raises(SystemExit):
        main(["sft", "--folder", str(tmp_path / "run"), "--set", "sft.epochs=1", "--no-checks"])
    assert "3 steps" in capsys.readouterr().out
    assert (tmp_path / "run" / "sft" / "model.safetensors").exists()


def test_the_module_loads_no_heavy_library():
    code = (
        "import sys, s1book.sft, s1book.format, s1book.traces; "
        "heavy = ('torch', 'transformers', 'trl', 'datasets', 'pyarrow'); "
        "print([name for name in heavy if name in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert json.loads(out.replace("'", '"')) == []
