"""Launch commands are valid shell, and our wrap policy trains like an unsharded model."""

import os
import subprocess
import sys

import pytest

from s1book.config import load_preset
from s1book.launch import commands, explained, shard
from s1book.sft import TrainingError


def test_commands_start_the_one_sft_on_every_gpu():
    texts = commands(load_preset("h100"), "h100")
    assert list(texts) == ["one node", "many nodes", "slurm"]
    for text in texts.values():
        assert text.count("--no-python s1book sft --preset h100") == 1
        assert "--nproc_per_node=8" in text and "$options" not in text
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    assert "--nnodes=2" in texts["many nodes"] and "#SBATCH --nodes=2" in texts["slurm"]
    assert texts["slurm"].startswith("#!/bin/bash\n") and texts["many nodes"] in texts["slurm"]


def test_each_command_says_how_many_processes_and_where_they_meet():
    texts = commands(load_preset("h100", ["launch.nodes=4", "launch.gpus_per_node=4",
                                          "engine.tensor_parallel=4"]), "h100")
    assert "--standalone --nproc_per_node=4 " in texts["one node"]
    assert '--nnodes=4 --nproc_per_node=4' in texts["many nodes"]
    assert '--rdzv_endpoint="$HEAD:29500"' in texts["many nodes"]
    lines = texts["slurm"].splitlines()
    assert {"#SBATCH --nodes=4", "#SBATCH --ntasks-per-node=1", "#SBATCH --gpus-per-node=4",
            "set -euo pipefail"} <= {*lines}  # torchrun starts the processes, SLURM one torchrun
    assert [i for i, x in enumerate(lines) if x.startswith("HEAD=$(scontrol")] < [
        i for i, x in enumerate(lines) if x.startswith("srun --kill-on-bad-exit=1 torchrun")]


def test_a_preset_path_is_quoted_for_the_shell():
    changed = commands(load_preset("h100"), "h100", ["seed=1"])["slurm"]
    assert "--preset h100 --set seed=1" in changed
    assert "--preset 'my run.yaml'" in commands(load_preset("h100"), "my run.yaml")["one node"]


def test_refusals_come_before_the_queue():
    with pytest.raises(TrainingError, match="gpus_per_node: found 0"):
        commands(load_preset("tiny"), "tiny")
    with pytest.raises(TrainingError, match="wanted a divisor"):
        commands(load_preset("h100", ["launch.gpus_per_node=8", "launch.nodes=2",
                                      "sft.micro_batch_size=1"]).model_copy(
            update={"sft": load_preset("h100").sft.model_copy(update={"batch_size": 12})}), "h100")


def test_explanation_states_the_batch():
    text = explained(load_preset("h100"), "h100")
    assert "8 GPUs x 1 sample(s) x 2 pass(es) = batch 16" in text
    assert "16 GPUs x 1 sample(s) x 1 pass(es) = batch 16" in text


SHARDED = """
import os, sys
import torch, torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from s1book.launch import shard
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (world,))
if world > 1:
    assert shard(model, mesh) == model.config.num_hidden_layers
    assert all(isinstance(p, DTensor) for p in model.parameters())
    units = [m for m in model.modules() if isinstance(m, FSDPModule)]
    assert len(units) == model.config.num_hidden_layers + 1  # each block, and the rest
optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
for step in range(4):
    ids = torch.randint(0, 50, (4, 24), generator=torch.Generator().manual_seed(step))
    loss = model(ids[rank::world], labels=ids[rank::world], use_cache=False).loss
    loss.backward()
    optimiser.step()
    optimiser.zero_grad()
    total = loss.detach() / world
    dist.all_reduce(total)
    if rank == 0:
        print("loss", total.item(), flush=True)
dist.destroy_process_group()  # a thread that outlives the interpreter aborts it, now and then
"""

ASKED = """
import sys
from pathlib import Path
from datasets import Dataset
from s1book.config import load_preset
from s1book.sft import make_trainer
preset = load_preset("tiny")
preset = preset.model_copy(update={"sft": preset.sft.model_copy(
    update={"sharding": "fsdp", "micro_batch_size": 8})})
rows = Dataset.from_list([{"input_ids": [5, 6], "labels": [5, 6]}] * 16)
make_trainer(preset, sys.argv[1], rows, Path("work"))
"""


def launched(folder, text, processes, model):
    """Run a script under torchrun."""
    script = folder / f"script{processes}.py"
    script.write_text(text)
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone",
         f"--nproc_per_node={processes}", script.name, str(model)],
        cwd=folder, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)})


def losses(done):
    """The losses that a script printed."""
    assert done.returncode == 0, done.stderr[-3000:]
    return [float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("loss")]


def test_two_sharded_processes_have_the_losses_of_one(tiny_folder, tmp_path):
    one, two = (losses(launched(tmp_path, SHARDED, n, tiny_folder)) for n in (1, 2))
    assert len(one) == 4 and one[-1] != one[0]
    assert two == pytest.approx(one, rel=1e-5)


def test_fsdp_that_became_ddp_is_refused(tiny_folder, tmp_path):
    done = launched(tmp_path, ASKED, 2, tiny_folder)
    assert done.returncode != 0 and "sft.sharding: found MULTI_CPU, wanted FSDP" in done.stderr


def test_a_model_without_our_blocks_is_refused():
    import torch

    with pytest.raises(TrainingError, match="found no Qwen2DecoderLayer in Linear"):
        shard(torch.nn.Linear(2, 2))
