"""gqa-kernels serve: transformers' server, in a process of its own, over an uneven child."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import AutoTokenizer

from gqa_kernels import cli
from gqa_kernels.convert import convert, save
from gqa_kernels.integrations.transformers import register
from tests import tiny_families
from tests.tiny_models import split, tiny, write_tokenizer

pytest.importorskip("transformers.cli.serve")
pytest.importorskip("fastapi", reason="pip install 'gqa-kernels[serve]'")

NEW_TOKENS = 8
START_SECONDS = 120
PAGES = ("--continuous-batching", "--cb-block-size", "16", "--cb-num-blocks", "64",
         "--cb-max-batch-tokens", "64")  # fmt: skip


def make(kind: str):
    """``apart``: K and V grouped apart, another count in each layer; ``equal``: counts alone."""
    register()
    if kind == "equal":
        return split(tiny(), 4)
    child = convert(tiny("llama", 6, 6), tiny_families.UNEVEN)
    child.set_attn_implementation("asym_gqa")
    return child


class Server:
    """``gqa-kernels serve`` on loopback, until ``stop``."""

    def __init__(self, folder, log, *options: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder, self.output = folder, log.open("w")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gqa_kernels", "serve", str(folder), "--device", "cpu",
             "--host", "127.0.0.1", "--port", str(self.port), *options],
            stdout=self.output, stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        deadline = time.monotonic() + START_SECONDS
        while not self.healthy():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"the server did not start:\n{log.read_text()[-4000:]}")
            time.sleep(0.2)

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def healthy(self) -> bool:
        try:
            return urllib.request.urlopen(self.url("/health"), timeout=10).status == 200
        except OSError:
            return False

    def completion(self, prompt: str) -> str:
        body = {"model": str(self.folder), "prompt": prompt, "max_tokens": NEW_TOKENS,
                "temperature": 0}  # fmt: skip
        request = urllib.request.Request(
            self.url("/v1/completions"), json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )  # fmt: skip
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.loads(answer.read())["choices"][0]["text"]

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.output.close()


@pytest.mark.parametrize("kind, options", [("apart", ()), ("apart", PAGES), ("equal", PAGES)])
def test_clients_at_the_same_time(tmp_path, kind, options):
    """Texts as ``generate`` writes them, with and without continuous batching."""
    model = make(kind)
    folder = save(model, tmp_path / "child")
    write_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    lengths = (1, 5, 17, 3, 30, 8)
    prompts = [tokenizer.decode(torch.randint(3, 64, (n,), generator=generator)) for n in lengths]
    expected = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=NEW_TOKENS, do_sample=False)
        new = out[0, ids["input_ids"].shape[1] :]
        expected.append(tokenizer.decode(new, skip_special_tokens=True))
    server = Server(folder, tmp_path / "server.log", *options)
    try:
        with ThreadPoolExecutor(len(prompts)) as pool:
            found = list(pool.map(server.completion, prompts))
    finally:
        server.stop()
    assert found == expected
    log = (tmp_path / "server.log").read_text()
    assert log.count(f"CB: {bool(options)}") == len(prompts)


@pytest.mark.parametrize("option, error", [
    (("--attn-implementation", "sdpa"), "use it without GGUF files"),
    (("--no-such-option",), "No such option"),
])  # fmt: skip
def test_options_that_do_not_go(tmp_path, capsys, option, error):
    folder = save(make("equal"), tmp_path / "child")
    write_tokenizer(folder)
    assert cli.main(["serve", str(folder), *option]) == 2
    assert error in capsys.readouterr().err


def test_folders_without_a_checkpoint(tmp_path, capsys):
    assert cli.main(["serve", str(tmp_path)]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"gqa-kernels: folder must be a checkpoint with a config.json, got {tmp_path}"
    ]


def test_transformers_alone_refuses(tmp_path):
    """``transformers serve`` does not know the class: it computes no equal groups."""
    from transformers.cli.serving.model_manager import ModelManager

    folder = save(make("equal"), tmp_path / "child")
    write_tokenizer(folder)
    with pytest.raises(AttributeError, match="AsymGQALlamaForCausalLM"):
        ModelManager(device="cpu", force_model=str(folder))
