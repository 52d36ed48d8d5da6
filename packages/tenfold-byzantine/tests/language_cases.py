"""Views, fake models and tiny language models for tests of language-model agents."""

from __future__ import annotations

import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tenfold.records import Completion
from tenfold_byzantine.contracts import Message, RoundLine, Rules, View
from tenfold_byzantine.rules import Context

os.environ.setdefault("DS_ACCELERATOR", "cpu")

GOOD = {"internal_strategy": "stay calm", "value": 7, "public_reasoning": "seven looks good to me"}
SHORT = Context(history_rounds=1, notes=1, line_chars=10, listing_chars=20, message_chars=40)


def rules(**changes):
    given = {"agents": 4, "faults": 1, "low": 0, "high": 50, "max_rounds": 9, "quota": 3}
    return Rules(**{**given, **changes})


def said(agent, value, text="because", round_=2):
    return Message(agent, round_, value, text)


def view(agent=1, phase="decide", role="honest", **changes):
    """A view of round 3 of a game of four."""
    lines = [
        RoundLine(1, (said(0, 5, "first"), said(1, 8, "mine"), said(2, 5, "x" * 60))),
        RoundLine(2, (said(0, 5, "again"), said(1, 5, "moved"), said(3, None))),
    ]
    given = {
        "rules": rules(), "agent": agent, "role": role, "round": 3, "phase": phase,
        "initial": 8 if role == "honest" else None, "held": 5,
        "neighbours": tuple(i for i in range(4) if i != agent),
        "inbox": tuple(said(i, 5 + i, f"said by {i}") for i in range(4) if i != 2),
        "history": lines, "notes": [(1, "trust nobody"), (2, "move to five")], "memory": None,
        "key": f"k{agent}",
    }  # fmt: skip
    return View(**{**given, **changes})


class Scripted:
    """A model whose answers a test writes; remembers what it was asked."""

    def __init__(self, answer):
        self.answer, self.calls = answer, []

    def generate(self, prompts, config):
        self.calls.append((list(prompts), config))
        seeds = config.seeds or [0] * len(prompts)
        texts = [self.answer(p, s) for p, s in zip(prompts, seeds, strict=True)]
        return [[Completion(t if isinstance(t, str) else json.dumps(t), [1, 2, 3])] for t in texts]


def tiny_lm(context=4096, **settings):
    """A random two-layer network over a byte-level BPE tokenizer."""
    import torch
    import transformers as hf
    from tenfold.lm.model import CausalLM
    from tenfold.lm.tokenizer import train_bpe

    texts = [json.dumps(GOOD) * 3, "Round 3 of 9. agent_0: 5 (again); agent_1: 5", "stop continue"]
    tokenizer = train_bpe(texts, 320)
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=context, eos_token_id=0, bos_token_id=None,
        initializer_range=0.3,
    )  # fmt: skip
    model = hf.LlamaForCausalLM(config).eval()
    return CausalLM(model, tokenizer, batch_tokens=200_000, **settings)


class Server:
    """An OpenAI-compatible endpoint; `answer(body, number)` gives a status and content."""

    def __init__(self, answer):
        self.bodies, lock, outer = [], threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with lock:
                    outer.bodies.append(body)
                    number = len(outer.bodies)
                status, content = answer(body, number)
                raw = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, format, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.http.shutdown()
        self.http.server_close()


def chat(text):
    """A chat answer."""
    text = text if isinstance(text, str) else json.dumps(text)
    choice = {
        "index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text},
    }  # fmt: skip
    return {"choices": [choice], "usage": {"prompt_tokens": 12, "completion_tokens": 5}}
