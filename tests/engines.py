"""Every engine on the same weights, for the tests that all of them must pass; and the slow oracle."""

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path

from s1book.backends import Completions, open_vllm, widen_heads
from s1book.config import Server
from s1book.engine import FlowEngine, ScriptedEngine, TransformersEngine, in_rounds

from token_server import TokenServer

VOCABULARY, CONTEXT = 462, 256  # of the tiny model; its context is longer
SERVERS = []  # processes
REST = ExitStack()  # closed at the end of the session, see conftest
HAS_VLLM = importlib.util.find_spec("vllm") is not None
NAMES = ["scripted", "transformers", "tight transformers", "server"] + HAS_VLLM * ["vllm", "tight vllm", "vllm server"]
# Defaults that would spoil every answer if an engine or a server took them (pitfall 22).
HOSTILE = {"do_sample": True, "temperature": 1.7, "top_k": 3, "top_p": 0.3, "repetition_penalty": 3.0, "max_new_tokens": 2,
           "min_p": 0.4, "eos_token_id": [0, 2, 30, 31, 32]}


@cache
def folder():
    """The tiny base model, in a folder whose generation defaults are hostile."""
    target = Path(REST.enter_context(tempfile.TemporaryDirectory(prefix="s1book-"))) / "base"
    shutil.copytree("data/tiny/base", target)
    (target / "generation_config.json").write_text(json.dumps(HOSTILE))
    return target


@cache
def wide_folder():
    """The same with heads that vLLM's server can run on a CPU."""
    target = folder().parent / "wide" / "base"
    widen_heads(folder(), target)
    for file in folder().iterdir():
        if not (target / file.name).exists() or file.name == "generation_config.json":
            shutil.copy(file, target)
    return target


@cache
def model():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder(), dtype="float32").eval()


def script(ids):
    """The next ids, best first, by the plainest means: the whole row through the model, nothing kept."""
    import torch

    with torch.inference_mode():
        return model()(torch.tensor([ids])).logits[0, -1].argsort(descending=True).tolist()


def oracle(strategies):
    """What must come out: the reference's rounds, and one row at a time without a cache."""
    writer = ScriptedEngine(script)
    return in_rounds(lambda asks: [writer.write(ask) for ask in asks], list(strategies))


@contextmanager
def vllm_server():
    """vLLM's own server with the tiny model, in processes of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(wide_folder()), "--port", str(port),
               "--host", "127.0.0.1", "--served-model-name", "base", "--dtype", "float32", "--max-model-len", str(CONTEXT),
               "--enforce-eager", "--max-num-seqs", "64", "--no-enable-chunked-prefill"]
    quiet = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1",
             "VLLM_LOGGING_LEVEL": "WARNING"}
    log = folder().parent / "server.log"
    with open(log, "w") as file:
        process = subprocess.Popen(command, env=os.environ | quiet, stdout=file, stderr=file,
                                   start_new_session=True)  # it starts others, which must end with it
    SERVERS.append(process)
    try:
        for _ in range(600):
            if process.poll() is not None:
                raise RuntimeError(f"the server ended: {log.read_text()[-2000:]}")
            with socket.socket() as knock:
                if not knock.connect_ex(("127.0.0.1", port)):
                    break
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


@cache
def make(name):
    """One engine of each kind for all tests."""
    if name == "scripted":
        return ScriptedEngine(script)
    if name.endswith("transformers"):
        return TransformersEngine(model(), 2 if "tight" in name else 64, VOCABULARY, CONTEXT)
    if name.endswith("server"):
        url = REST.enter_context(vllm_server()) if "vllm" in name else REST.enter_context(TokenServer(script)).url
        return FlowEngine(Completions(Server(like="vllm", url=url, concurrency=8, wait=0.01), "base", VOCABULARY, CONTEXT))
    few = {"num_gpu_blocks_override": 12, "max_num_seqs": 6} if "tight" in name else {"max_num_seqs": 64}
    return FlowEngine(open_vllm(folder(), VOCABULARY, CONTEXT, "cpu", dtype="float32", **few))
