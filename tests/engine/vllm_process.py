"""vLLM in this process, and as a server of its own."""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gqa_kernels.cli.check_engine import attention_classes

KV_MEMORY = 256 << 20
QUIET = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
START_SECONDS = 240  # on a busy machine


@contextmanager
def engine(folder: Path, **options) -> Iterator[object]:
    """``vllm.LLM`` without processes of its own."""
    os.environ.update(QUIET, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(
        str(folder),
        **{
            "dtype": "float32",
            "max_model_len": 64,
            "enforce_eager": True,
            "kv_cache_memory_bytes": KV_MEMORY,
            "skip_tokenizer_init": True,
            **options,
        },
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()  # ends the workers of tensor parallelism
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def generate(llm, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """Greedy continuations, all prompts at once."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False
    )
    found = llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
    return [list(one.outputs[0].token_ids) for one in found]


def kernels(llm) -> list[str]:
    """Names of the classes that compute the model's attention."""
    return llm.apply_model(attention_classes)[0]


def uneven_heads(model) -> list[tuple[int, int, int]]:
    """Query, K and V heads of each layer that a rank runs; our model classes alone have them."""
    from gqa_kernels.integrations.vllm.layer import UnevenAttention

    layers = [x for x in model.modules() if isinstance(x, UnevenAttention)]
    return [(x.impl.num_heads, *x.impl.layer.kv_heads) for x in layers]


def register_class(architecture: str) -> None:
    """Import the class here: vLLM would start a process to look at each one."""
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.plugins import load_general_plugins

    from gqa_kernels.integrations.vllm import models

    load_general_plugins()
    ModelRegistry.register_model(architecture, getattr(models, architecture))


def refusal(folder: Path, options: dict | None = None, **environment: str) -> str:
    """What a vLLM process prints that must fail to load a checkpoint; see :func:`refusals`."""
    return refusals({"it": (folder, options or {})}, **environment)["it"]


def refusals(asked: dict[str, tuple[Path, dict]], **environment: str) -> dict[str, str]:
    """Errors of checkpoints that a vLLM process must fail to load, one after another.

    Args:
        asked: for each attempt its folder, and options of ``vllm.LLM``.
        environment: variables of the process.

    Returns:
        The error of each attempt, with what its workers printed.
    """
    code = f"""
import traceback
from vllm import LLM
if __name__ == "__main__":
    for name, (folder, options) in { ({n: (str(f), o) for n, (f, o) in asked.items()})!r}.items():
        print("attempt", repr(name), flush=True)
        try:
            LLM(folder, enforce_eager=True, max_model_len=64, skip_tokenizer_init=True,
                dtype="float32", kv_cache_memory_bytes=1 << 24, **options)
            print("loaded", flush=True)
        except Exception:
            traceback.print_exc(file=sys.stdout)
"""
    script = next(iter(asked.values()))[0] / "load.py"  # workers are spawned: they import it
    script.write_text("import sys\n" + code)
    done = subprocess.run(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        check=False, timeout=300,
        env={**os.environ, **QUIET, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    printed = done.stdout.split("attempt ")[1:]
    found = dict(zip(asked, printed, strict=True))
    assert not [name for name, text in found.items() if "\nloaded\n" in text]
    return found


class Server:
    """An OpenAI server on loopback; its engine runs in a spawned process.

    Args:
        folder: the checkpoint.
        arguments: of ``vllm serve``.
        log: file for what it prints.
    """

    def __init__(self, folder: Path, arguments: list[str], log: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder),
            "--served-model-name", "child", "--host", "127.0.0.1", "--port", str(self.port),
            "--dtype", "float32", "--enforce-eager", "--kv-cache-memory-bytes", str(KV_MEMORY),
            *arguments,
        ]  # fmt: skip
        self.log = log
        self.output = log.open("w")
        self.process = subprocess.Popen(
            command, stdout=self.output, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, **QUIET, "VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn"},
        )  # fmt: skip
        deadline = time.monotonic() + START_SECONDS
        while not self.healthy():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"vllm did not start:\n{log.read_text()[-4000:]}")
            time.sleep(0.5)

    def healthy(self) -> bool:
        try:
            return self.get("/health")[0] == 200
        except OSError:
            return False

    def get(self, path: str) -> tuple[int, str]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode()

    def metric(self, name: str) -> float:
        """The sum of a metric's values."""
        lines = self.get("/metrics")[1].splitlines()
        values = [float(x.rsplit(" ", 1)[1]) for x in lines if x.startswith(name)]
        assert values, f"no metric {name}"
        return sum(values)

    def completion(self, prompt: list[int], **options) -> tuple[int, dict]:
        """Status and answer of ``/v1/completions``."""
        body = {"model": "child", "prompt": prompt, "temperature": 0, "ignore_eos": True,
                "return_token_ids": True, **options}  # fmt: skip
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/completions", json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )  # fmt: skip
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def stop(self) -> None:
        """End the server and the processes that it started."""
        for sent in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, sent)
            except ProcessLookupError:
                break
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                continue
        self.output.close()
