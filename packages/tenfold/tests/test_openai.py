"""The OpenAI client against a server in this process: what it sends, how it fails."""

from __future__ import annotations

import contextlib
import email.utils
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

pytest.importorskip("httpx2")

from tenfold.builtin import openai_http
from tenfold.builtin.openai import OpenAI
from tenfold.builtin.openai_wire import completions, request_seed
from tenfold.errors import CapabilityError, ComponentError, ConfigError, RunFailed
from tenfold.records import GenerationConfig
from tenfold.testing.kit import check_model

GREEDY = GenerationConfig(max_new_tokens=9)


def chat(*texts, **message):
    """A chat answer with these choices."""
    messages = [{"role": "assistant", "content": text, **message} for text in texts]
    choices = [
        {"index": i, "finish_reason": "stop", "message": said} for i, said in enumerate(messages)
    ]
    return {"choices": choices, "usage": {"prompt_tokens": 3, "completion_tokens": 5}}


def echo(body):
    """Answers with the last message in capitals."""
    return 200, {}, chat(body["messages"][-1]["content"].upper())


class Server:
    """An endpoint whose answers a test scripts.

    `answers` are functions of the request's body (the last one repeats) that give status,
    headers and content; content may be bytes, which are sent as they are.
    """

    def __init__(self):
        self.answers = [echo]
        self.requests = []
        self.busy = self.most = 0
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                self.reply(body)

            def do_GET(self):
                self.reply(None)

            def reply(self, body):
                with outer.lock:
                    outer.requests.append((self.path, body, dict(self.headers)))
                    answer = outer.answers.pop(0) if len(outer.answers) > 1 else outer.answers[0]
                    outer.busy += 1
                    outer.most = max(outer.most, outer.busy)
                try:
                    status, headers, content = answer(body)
                finally:
                    with outer.lock:
                        outer.busy -= 1
                raw = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                for name, value in {"content-length": len(raw), **headers}.items():
                    self.send_header(name, str(value))
                with contextlib.suppress(ConnectionError):  # a client that gave up waiting
                    self.end_headers()
                    self.wfile.write(raw)
                if headers.get("content-length", len(raw)) != len(raw):
                    self.close_connection = True

            def log_message(self, format, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def bodies(self):
        return [body for _, body, _ in self.requests]


@pytest.fixture
def server():
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def model(server, monkeypatch):
    monkeypatch.setenv("TEST_KEY", "sk-secret")

    def make(**settings):
        quick = {"model": "m", "base_url": server.url, "api_key_env": "TEST_KEY", "backoff_s": 0.01}
        return OpenAI(**{**quick, **settings})

    return make


def texts(model, *prompts, **settings):
    rows = model.generate(list(prompts), GenerationConfig(**settings))
    return [[c.text for c in row] for row in rows]


def status(code, content=b"", **headers):
    return lambda body: (code, {k.replace("_", "-"): v for k, v in headers.items()}, content)


# --- what is sent and understood --------------------------------------------------------------


def test_passes_the_conformance_kit(model, server):
    def answer(body):
        if "response_format" in body:
            return 200, {}, chat('{"n": 3}')
        return echo(body)

    server.answers = [answer]
    findings = check_model(model(), ("generate", "constrain"))
    assert {f.status for f in findings} == {"pass"}, findings


def test_request_says_what_the_configuration_does(model, server):
    config = GenerationConfig(
        max_new_tokens=7, temperature=0.5, top_p=0.9, top_k=4, stop=("END",), n=2, seed=2**40 + 5,
        logprobs=1,
    )  # fmt: skip
    model(extra={"reasoning_effort": "low"}).generate(["hi"], config)
    path, body, headers = server.requests[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer sk-secret"
    assert body == {
        "model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 7,
        "temperature": 0.5, "top_p": 0.9, "top_k": 4, "stop": ["END"], "n": 2, "seed": 5,
        "logprobs": True, "reasoning_effort": "low",
    }  # fmt: skip


def test_greedy_requests_are_plain(model, server):
    chat_prompt = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    assert texts(model(max_tokens_field="max_completion_tokens"), chat_prompt) == [["U"]]
    assert server.bodies()[0] == {
        "model": "m", "messages": chat_prompt, "max_completion_tokens": 128, "temperature": 0.0,
    }  # fmt: skip


def test_no_key_no_header(model, server, monkeypatch):
    monkeypatch.delenv("TEST_KEY")
    model().generate(["x"], GREEDY)
    assert "Authorization" not in server.requests[0][2]


def test_completions_interface_takes_text_and_ids(model, server):
    logprobs = {"token_logprobs": [None, -0.5], "tokens": ["a", "b"]}
    server.answers = [
        lambda body: (200, {}, {"choices": [{"text": "out", "finish_reason": "length",
                                             "logprobs": logprobs}]})
    ]  # fmt: skip
    client = model(endpoint="completions")
    [[first], [second]] = client.generate(["text", [1, 2]], GenerationConfig(logprobs=1))
    assert (first.text, first.finish_reason, first.logprobs) == ("out", "length", [-0.5])
    assert second.text == "out"
    assert {path for path, _, _ in server.requests} == {"/v1/completions"}
    prompts = [body["prompt"] for body in server.bodies()]
    assert "text" in prompts
    assert [1, 2] in prompts
    with pytest.raises(ConfigError, match=r'not chat messages(.|\n)*endpoint = "chat"'):
        client.generate([[{"role": "user", "content": "x"}]], GREEDY)
    with pytest.raises(ConfigError, match=r'not token ids(.|\n)*endpoint = "completions"'):
        model().generate([[1, 2]], GREEDY)


def test_reasoning_is_kept_under_either_name(model, server):
    server.answers = [
        status(200, chat("a", reasoning="thought")),
        status(200, chat("b", reasoning_content="older name")),
        status(200, chat("c", reasoning="one", reasoning_content="other")),
        status(200, chat(None, reasoning_content="only thought")),
    ]
    client = model()
    stats = [client.generate(["x"], GREEDY)[0][0] for _ in range(4)]
    assert stats[0].stats["reasoning"] == "thought"
    assert stats[1].stats["reasoning"] == "older name"
    assert (stats[2].stats["reasoning"], stats[2].stats["reasoning_content"]) == ("one", "other")
    assert (stats[3].text, stats[3].stats["reasoning"]) == ("", "only thought")
    assert stats[0].stats["completion_tokens"] == 5


def test_answers_of_many_dialects():
    def one(choice, config=GREEDY, **more):
        return completions({"choices": [choice], **more}, config, "u")[0]

    said = {"message": {"content": "x"}}
    assert one({**said, "finish_reason": "stop"}).finish_reason == "eos"
    stop = GenerationConfig(stop=(";",))
    assert one({**said, "finish_reason": "stop"}, stop).finish_reason == "stop"
    met = {**said, "finish_reason": "stop", "stop_reason": ";"}
    assert one(met, stop).finish_reason == "stop"
    assert one({**met, "stop_reason": None}, stop).finish_reason == "eos"
    filtered = one({**said, "finish_reason": "content_filter"})
    assert (filtered.finish_reason, filtered.stats["finish_reason"]) == ("eos", "content_filter")
    parts = [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]
    assert one({"message": {"content": parts}}).text == "ab"
    refused = one({"message": {"content": None, "refusal": "no"}})
    assert (refused.text, refused.stats["refusal"]) == ("", "no")
    logprobs = {"content": [{"token": "a", "logprob": -1}, {"token": "b", "logprob": -2.5}]}
    assert one({**said, "logprobs": logprobs}).logprobs == [-1.0, -2.5]
    usage = {"prompt_tokens": 1, "completion_tokens": 2,
             "completion_tokens_details": {"reasoning_tokens": 7}}  # fmt: skip
    assert one(said, usage=usage).stats == {
        "prompt_tokens": 1, "completion_tokens": 2, "reasoning_tokens": 7,
    }  # fmt: skip
    two = completions({"choices": [{"index": 1, "text": "b"}, {"index": 0, "text": "a"}],
                       "usage": usage}, GREEDY, "u")  # fmt: skip
    assert [c.text for c in two] == ["a", "b"]
    assert two[0].stats == {"prompt_tokens": 1}  # tokens of both together say nothing of one


@pytest.mark.parametrize("answer", [{}, {"choices": []}, [], {"choices": ["x"]}, {"choices": [{}]}])
def test_answers_without_choices_are_clear_errors(model, server, answer):
    server.answers = [status(200, answer)]
    with pytest.raises(RunFailed, match="answered without choices"):
        model().generate(["x"], GREEDY)


def test_endpoints_that_ignore_n_are_asked_again(model, server):
    server.answers = [lambda body: (200, {}, chat(str(body["seed"])))]
    [row] = texts(model(), "x", n=3, temperature=1.0, seed=10)
    assert row == ["10", "11", "12"]
    assert [body.get("n") for body in server.bodies()] == [3, None, None]
    server.answers = [status(200, chat("a", "b", "c", "d"))]
    assert texts(model(), "x", n=3, temperature=1.0) == [["a", "b", "c"]]
    assert texts(model(), "x", n=2) == [["a", "a"]]  # greedy samples are equal


def test_seeds_are_the_runs_or_the_prompts(model, server):
    sampled = GenerationConfig(temperature=1.0)
    assert request_seed("a", sampled) == request_seed("a", sampled) != request_seed("b", sampled)
    assert request_seed("a", GenerationConfig(seed=7)) == 7
    texts(model(send_seed=False), "x", temperature=1.0, seed=4)
    assert "seed" not in server.bodies()[0]


def test_constraints_are_sent_and_checked(model, server):
    schema = {"type": "object"}
    server.answers = [status(200, chat('{"a": 1}'))]
    assert texts(model(), "x", constraint={"json_schema": schema}) == [['{"a": 1}']]
    sent = server.bodies()[0]["response_format"]["json_schema"]
    assert (sent["schema"], sent["strict"]) == (schema, True)
    server.answers = [status(200, chat("Sure! {"))]
    with pytest.raises(RunFailed, match="follow the json_schema constraint: it wrote 'Sure"):
        texts(model(), "x", constraint={"json_schema": json.dumps(schema)})
    with pytest.raises(CapabilityError, match="kinds json_schema; got regex"):
        texts(model(), "x", constraint={"regex": "a"})
    with pytest.raises(ConfigError, match="not JSON"):
        texts(model(), "x", constraint={"json_schema": "{"})


def test_vllm_takes_every_kind_of_constraint(model, server):
    client = model(dialect="vllm")
    assert client.constraint_kinds == {"json_schema", "regex", "choice"}
    server.answers = [status(200, chat("ab")), status(200, chat("left")), status(200, chat("up"))]
    assert texts(client, "x", constraint={"regex": "a."}) == [["ab"]]
    assert texts(client, "x", constraint={"choice": ["left", "right"]}) == [["left"]]
    sent = [body["structured_outputs"] for body in server.bodies()]
    assert sent == [{"regex": "a."}, {"choice": ["left", "right"]}]
    with pytest.raises(RunFailed, match="did not follow the choice constraint"):
        texts(client, "x", constraint={"choice": ["left", "right"]})


def test_a_truncated_answer_is_not_held_against_the_constraint(model, server):
    answer = chat('{"a": ')
    answer["choices"][0]["finish_reason"] = "length"
    server.answers = [status(200, answer)]
    [[cut]] = model().generate(["x"], GenerationConfig(constraint={"json_schema": {}}))
    assert (cut.text, cut.finish_reason) == ('{"a": ', "length")


def test_the_only_model_served_needs_no_name(model, server):
    server.answers = [status(200, {"data": [{"id": "solo"}]}), echo]
    client = model(model=None)
    assert texts(client, "x") == [["X"]]
    assert [path for path, _, _ in server.requests] == ["/v1/models", "/v1/chat/completions"]
    assert server.bodies()[1]["model"] == "solo"
    server.answers = [status(200, {"data": [{"id": "a"}, {"id": "b"}]})]
    with pytest.raises(ComponentError, match=r"serves 2 models \(a, b\); name one"):
        model(model=None).generate(["x"], GREEDY)


def test_fingerprint_follows_address_model_and_fields(model, server):
    first = model().fingerprint()
    assert first == model(concurrency=1, retries=0).fingerprint()
    others = [model(model="n"), model(endpoint="completions"), model(extra={"a": 1}),
              model(base_url="http://127.0.0.1:1/v1")]  # fmt: skip
    assert len({first, *(other.fingerprint() for other in others)}) == 5
    assert not server.requests


# --- passing failures -------------------------------------------------------------------------


@pytest.mark.parametrize("code", [408, 429, 500, 502, 503, 504])
def test_passing_failures_are_tried_again(model, server, code):
    server.answers = [status(code, {"error": {"message": "later"}}), status(code), echo]
    assert texts(model(), "x") == [["X"]]
    assert len(server.requests) == 3


def test_retry_after_is_obeyed_up_to_the_longest_pause(model, server, monkeypatch):
    pauses = []

    async def sleep(seconds):
        pauses.append(seconds)

    monkeypatch.setattr(openai_http.asyncio, "sleep", sleep)
    soon = email.utils.formatdate(time.time() + 30, usegmt=True)
    server.answers = [
        status(429, retry_after="7"), status(503, retry_after="9999"),
        status(429, retry_after_ms="1500"), status(429, retry_after=soon), echo,
    ]  # fmt: skip
    assert texts(model(max_wait_s=60.0), "x") == [["X"]]
    assert pauses[:3] == [7.0, 60.0, 1.5]
    assert 20 < pauses[3] <= 30


def test_pauses_double_and_stay_below_the_longest(model, server, monkeypatch):
    pauses = []

    async def sleep(seconds):
        pauses.append(seconds)

    monkeypatch.setattr(openai_http.asyncio, "sleep", sleep)
    server.answers = [status(500)]
    with pytest.raises(RunFailed, match=r"failed \(8 attempts\): status 500: no message"):
        texts(model(retries=7, backoff_s=1.0, max_wait_s=10.0), "x")
    assert len(pauses) == 7
    for k, pause in enumerate(pauses):
        assert min(0.75 * 2**k, 10.0) <= pause <= min(1.25 * 2**k, 10.0)


@pytest.mark.parametrize(
    "broken",
    [
        status(200, b'{"choices": [{"mess'),
        status(200, b""),
        status(200, b'{"choices": [{"mess', content_length=500),
        status(200, b"<html>Bad gateway</html>"),
    ],
)
def test_half_an_answer_is_asked_for_again(model, server, broken):
    server.answers = [broken, echo]
    assert texts(model(), "x") == [["X"]]
    server.answers = [broken]
    with pytest.raises(RunFailed, match=r"\(2 attempts\): (the answer is no whole JSON|the conn)"):
        texts(model(retries=1), "x")


def test_slow_answers_time_out_and_are_asked_for_again(model, server):
    done = threading.Event()

    def slow(body):
        done.wait(5)
        return echo(body)

    server.answers = [slow, echo]
    assert texts(model(timeout_s=0.2), "x") == [["X"]]
    server.answers = [slow]
    with pytest.raises(RunFailed, match=r"\(2 attempts\): no answer within 0.2 s"):
        texts(model(timeout_s=0.2, retries=1), "x")
    done.set()


# --- failures for good ------------------------------------------------------------------------


def test_refused_key_names_the_variable_and_never_the_key(model, server, monkeypatch):
    said = {"error": {"message": "Incorrect API key provided: sk-secret."}}
    server.answers = [status(401, said)]
    with pytest.raises(ComponentError, match="TEST_KEY is set, but was not accepted") as caught:
        model().generate(["x"], GREEDY)
    assert server.url in str(caught.value)
    assert "provided: ***" in str(caught.value)
    assert "sk-secret" not in str(caught.value)
    assert len(server.requests) == 1  # a refused key is not tried again
    monkeypatch.delenv("TEST_KEY")
    with pytest.raises(ComponentError, match="environment variable TEST_KEY is not set"):
        model().generate(["x"], GREEDY)


def test_down_endpoint_is_named_and_not_waited_for_twice(model):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    client = model(base_url=f"http://127.0.0.1:{port}/v1", retries=2)
    with pytest.raises(ComponentError, match=rf"cannot reach http://127\.0\.0\.1:{port}/v1 \(3 "):
        client.generate(["x"], GREEDY)
    with pytest.raises(ComponentError, match=r"\(1 attempt\)"):
        client.generate(["x"], GREEDY)


def test_unknown_model_and_spent_account_are_not_tried_again(model, server):
    server.answers = [status(404, {"message": "The model `m` does not exist."})]
    with pytest.raises(ComponentError, match="answered 404: The model `m` does not exist"):
        model().generate(["x"], GREEDY)
    spent = {"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}
    server.answers = [status(429, spent)]
    with pytest.raises(ComponentError, match="the account has nothing left"):
        model().generate(["x"], GREEDY)
    server.answers = [status(308, location="https://elsewhere.example/v1")]
    with pytest.raises(ComponentError, match=r"redirects to https://elsewhere\.example"):
        model().generate(["x"], GREEDY)
    assert len(server.requests) == 3


def test_a_bad_request_fails_alone_and_the_others_are_not_paid_for_twice(model, server):
    def picky(body):
        if "long" in body["messages"][0]["content"]:
            return 400, {}, {"error": {"message": "too many tokens"}}
        return echo(body)

    server.answers = [picky]
    client = model()
    prompts = ["a", "long one", "b", "a"]
    with pytest.raises(RunFailed, match=r"refused the request \(400\): too many tokens"):
        client.generate(prompts, GREEDY)
    assert len(server.requests) == 4
    # The host then asks one by one; only the failed one goes out again.
    assert [texts(client, p, max_new_tokens=9) for p in ("a", "b", "a")] == [
        [["A"]],
        [["B"]],
        [["A"]],
    ]
    with pytest.raises(RunFailed):
        client.generate(["long one"], GREEDY)
    assert len(server.requests) == 5
    texts(client, "a", max_new_tokens=9)
    assert len(server.requests) == 6  # what was kept is given once


def test_concurrency_is_bounded_and_order_kept(model, server):
    three = threading.Barrier(3)

    def together(body):
        three.wait(20)  # nobody leaves before three are in
        return echo(body)

    server.answers = [together]
    prompts = [f"p{i}" for i in range(12)]
    client = model(concurrency=3)
    assert texts(client, *prompts) == [[p.upper()] for p in prompts]
    assert server.most == 3
    # Also over several callers of one model.
    server.most = 0
    callers = [threading.Thread(target=texts, args=(client, *prompts[:4])) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert server.most == 3


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("127.0.0.1:8000/v1", "it must look like"),
        ("ftp://host/v1", "it must look like"),
        ("http://user:pw@host/v1", "secrets stay out"),
        ("http://host:port/v1", "base_url is"),
        ("http:///v1", "it must look like"),
    ],
)
def test_wrong_addresses_are_found_when_built(url, message):
    with pytest.raises(ConfigError, match=message):
        OpenAI(base_url=url)


def test_full_paths_are_cut_to_the_base():
    assert openai_http.checked_url("http://h/v1/chat/completions/") == "http://h/v1"


@pytest.mark.parametrize(
    ("url", "local"),
    [
        ("http://127.0.0.1:8000/v1", True), ("http://localhost/v1", True),
        ("http://[::1]/v1", True),
        ("http://10.0.0.7/v1", True), ("http://vllm:8000/v1", True),
        ("http://8.8.8.8/v1", False), ("https://api.openai.com/v1", False),
    ],
)  # fmt: skip
def test_offline_refuses_the_outside_only(url, local):
    if local:
        OpenAI(base_url=url, offline=True)
    else:
        with pytest.raises(ComponentError, match=r"workspace is offline(.|\n)*offline = false"):
            OpenAI(base_url=url, offline=True)
        OpenAI(base_url=url, offline=False)


def test_unprintable_keys_are_refused_before_they_are_sent(model, monkeypatch, server):
    monkeypatch.setenv("TEST_KEY", "sk-ü")
    with pytest.raises(ComponentError, match="TEST_KEY holds characters no key has"):
        model().generate(["x"], GREEDY)
    assert not server.requests


def test_interruption_ends_at_once(server):
    entered = threading.Event()
    release = threading.Event()

    def never(body):
        entered.set()
        release.wait(30)
        return echo(body)

    server.answers = [never]
    script = (
        # A shell that starts the tests in the background makes them ignore SIGINT.
        "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from tenfold.builtin.openai import OpenAI\n"
        "from tenfold.records import GenerationConfig\n"
        f"m = OpenAI('m', {server.url!r})\n"
        "try:\n    m.generate(['x'] * 4, GenerationConfig())\n"
        "except KeyboardInterrupt:\n    print('interrupted')\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert entered.wait(30)
        os.kill(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=20)
    finally:
        process.kill()
        release.set()
    assert output == "interrupted\n"
    assert process.returncode == 0


def test_unused_clients_end_their_thread(model):
    def running():
        return {t for t in threading.enumerate() if t.name == "tenfold-http"}

    gc.collect()
    before = running()
    client = model()
    client.generate(["x"], GREEDY)
    [thread] = running() - before
    del client
    gc.collect()
    thread.join(20)
    assert not thread.is_alive()


def test_empty_batch_asks_nothing(model, server):
    assert model().generate([], GREEDY) == []
    assert not server.requests
