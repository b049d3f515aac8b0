"""How much memory of the machine does FSDP2 take before the weights are on the GPUs? One number per process.

Run: `OMP_NUM_THREADS=1 python tests/benchmarks/bench_sharding.py` (a minute or two). Two processes on
the CPU load a random model of 88 million weights in bfloat16 and hand it to accelerate's own
`fsdp2_prepare_model`, once as `s1book sft` does and once with `cpu_ram_efficient_loading`. What
counts is memory that no other process shares, as the system reports it, in MB above the start.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from types import SimpleNamespace


def private():
    """MB of this process that are not a shared file."""
    with open("/proc/self/status") as lines:
        found = dict(line.split(":", 1) for line in lines)
    return int(found["RssAnon"].split()[0]) / 1e3


def build(folder):
    """A random model whose file can be loaded."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    Qwen2ForCausalLM(Qwen2Config(
        num_hidden_layers=4, hidden_size=768, intermediate_size=3072, num_attention_heads=12,
        num_key_value_heads=12, vocab_size=32000, tie_word_embeddings=False,
    )).to(torch.bfloat16).save_pretrained(folder)


def accelerator(economical):
    """As much of an Accelerator as fsdp2_prepare_model looks at: on a CPU the real one refuses FSDP."""
    import torch
    import torch.distributed as dist
    from accelerate.utils import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import MixedPrecisionPolicy

    from s1book.sft import FSDP

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=FSDP["version"], auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=FSDP["transformer_layer_cls_to_wrap"],
        reshard_after_forward=FSDP["reshard_after_forward"],
        state_dict_type=FSDP["state_dict_type"], cpu_ram_efficient_loading=economical)
    plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))

    class Mesh:
        def __getitem__(self, names):
            return mesh

    return SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin), device=torch.device("cpu"),
        is_main_process=dist.get_rank() == 0, mixed_precision="bf16", torch_device_mesh=Mesh(),
        parallelism_config=SimpleNamespace(fsdp_dim_names=["all"]))


def process(folder, economical):
    """One of two processes: load, shard, and print what it took."""
    import torch.distributed as dist
    from accelerate import PartialState
    from accelerate.utils import enable_fsdp_ram_efficient_loading
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model
    from transformers import AutoModelForCausalLM

    dist.init_process_group("gloo")
    if economical:
        enable_fsdp_ram_efficient_loading()
    start, peak, done = private(), [0.0], threading.Event()

    def watch():
        while not done.is_set():
            peak[0] = max(peak[0], private() - start)
            time.sleep(0.005)

    threading.Thread(target=watch, daemon=True).start()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16")
    loaded, weights = private() - start, model.num_parameters()
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    PartialState(cpu=True)  # accelerate's log asks it which process speaks
    model = fsdp2_prepare_model(accelerator(economical), model)
    done.set()
    print("row", json.dumps({
        "cpu_ram_efficient_loading": economical, "process": dist.get_rank(), "weights": weights,
        "float32 copy": round(4 * weights / 1e6), "after loading": round(loaded),
        "peak while sharding": round(peak[0])}), flush=True)


def main():
    """Both ways, one after the other."""
    if len(sys.argv) > 1:
        process(sys.argv[1], sys.argv[2] == "True")
        return
    with tempfile.TemporaryDirectory() as folder:
        build(folder)
        for economical in (False, True):
            done = subprocess.run(
                [sys.executable, "-m", "torch.distributed.run", "--standalone",
                 "--nproc_per_node=2", __file__, folder, str(economical)],
                capture_output=True, text=True)
            rows = [line[4:] for line in done.stdout.splitlines() if line.startswith("row ")]
            print("\n".join(rows) if len(rows) == 2 else done.stderr[-2000:])


if __name__ == "__main__":
    main()
