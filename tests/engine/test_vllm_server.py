"""An uneven child behind vLLM's OpenAI server: many clients, and clients that misbehave."""

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("vllm")

from tests.engine.models import CONTEXT, make_child, prompts
from tests.engine.vllm_process import Server
from tests.tiny_models import write_tokenizer

pytestmark = pytest.mark.engine

CLIENTS = 32
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def child(tmp_path_factory):
    child = make_child("llama", tmp_path_factory.mktemp("child"))
    write_tokenizer(child.folder)
    return child


@pytest.fixture(scope="module")
def server(child, tmp_path_factory):
    """With a cache of 10 blocks, which 3 long requests fill."""
    arguments = [
        "--max-model-len", str(CONTEXT), "--block-size", "16", "--num-gpu-blocks-override", "10",
        "--no-enable-prefix-caching", "--attention-backend", "ASYM_GQA",
    ]  # fmt: skip
    server = Server(child.folder, arguments, tmp_path_factory.mktemp("log") / "server.log")
    yield server
    server.stop()


def check_clients(server, child, seed: int) -> None:
    """Requests of mixed lengths at the same time, each answered as transformers does."""
    asked = prompts(CLIENTS, CONTEXT - NEW_TOKENS, seed)
    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = list(pool.map(lambda p: server.completion(p, max_tokens=NEW_TOKENS), asked))
    assert [status for status, _ in answers] == [200] * CLIENTS
    found = [answer["choices"][0]["token_ids"] for _, answer in answers]
    assert found == child.expected(asked, NEW_TOKENS)


def wait_until_idle(server) -> None:
    deadline = time.monotonic() + 60
    while server.metric("vllm:num_requests_running") + server.metric("vllm:num_requests_waiting"):
        assert time.monotonic() < deadline, "requests of clients that left still run"
        time.sleep(0.2)


def test_clients_at_the_same_time(server, child):
    check_clients(server, child, seed=1)
    assert server.metric("vllm:num_preemptions_total") > 0  # the cache was full


def test_too_long(server, child):
    status, answer = server.completion([5] * (CONTEXT + 1), max_tokens=1)
    assert status == 400 and str(CONTEXT) in json.dumps(answer)
    long = [5] * (CONTEXT - 4)
    status, answer = server.completion(long, max_tokens=9)  # it ends with the context
    assert answer["choices"][0]["token_ids"] == child.expected([long], 4)[0]
    (prompt,) = prompts(1, CONTEXT - NEW_TOKENS, seed=2)
    status, answer = server.completion(prompt, max_tokens=NEW_TOKENS)
    assert answer["choices"][0]["token_ids"] == child.expected([prompt], NEW_TOKENS)[0]


def test_cancelled_requests(server, child):
    """Connections closed while the answer streams."""
    body = {"model": "child", "prompt": [5, 6], "max_tokens": CONTEXT - 2, "ignore_eos": True,
            "stream": True}  # fmt: skip
    for _ in range(4):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        connection.getresponse().read(1)
        connection.close()
    wait_until_idle(server)
    check_clients(server, child, seed=3)


def test_a_client_is_killed(server, child):
    code = f"""
import json, urllib.request
body = {{"model": "child", "prompt": [5, 6], "max_tokens": {CONTEXT - 2}, "ignore_eos": True,
        "stream": True}}
answer = urllib.request.urlopen(urllib.request.Request(
    "http://127.0.0.1:{server.port}/v1/completions", json.dumps(body).encode(),
    {{"Content-Type": "application/json"}}))
answer.readline()
print("reading", flush=True)
import time; time.sleep(600)
"""
    clients = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(2)
    ]
    for client in clients:
        assert client.stdout.readline() == b"reading\n"
        os.kill(client.pid, signal.SIGKILL)
        client.wait()
        client.stdout.close()
    wait_until_idle(server)
    check_clients(server, child, seed=4)
