"""A real HTTP server on localhost that speaks completions over token ids, as vLLM's does, and fails when told to.

What it writes comes from a script: a function from ids to the next ids, best first. `troubles` is a list of what
happens to the next requests: an HTTP status, "drop" (the line is cut before the reply), "half" (in the middle of a
stream), "text" (no ids in the reply), "eos" (an end that names no id). Unknown fields are refused, as a strict server
would.
"""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FIELDS = {"model", "prompt", "max_tokens", "temperature", "seed", "top_p", "presence_penalty", "frequency_penalty",
          "top_k", "min_p", "repetition_penalty", "ignore_eos", "return_token_ids", "min_tokens", "stop_token_ids",
          "stream"}


class TokenServer:
    def __init__(self, script, model="base", troubles=(), context=1024):
        self.script, self.model, self.troubles, self.context = script, model, list(troubles), context
        self.bodies, self.under_way, self.peak, self.lock = [], 0, 0, threading.Lock()

    def __enter__(self):
        handler = type("Handler", (Handler,), {"owner": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()

    def write(self, body):
        """New ids, the last of them a stop if one came."""
        new = []
        while len(new) < body["max_tokens"]:
            with self.lock:
                wishes = self.script(body["prompt"] + new)
            early = len(new) < body["min_tokens"]
            new.append(next(t for t in wishes if not (early and t in body["stop_token_ids"])))
            if new[-1] in body["stop_token_ids"]:
                break
        return new


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: TokenServer

    def log_message(self, *_):
        pass

    def send(self, status, content):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        self.send(200, {"object": "list", "data": [{"id": self.owner.model, "object": "model", "created": 0,
                                                    "owned_by": "me", "max_model_len": self.owner.context}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.owner.lock:
            self.owner.bodies.append(body)
            self.owner.under_way += 1
            self.owner.peak = max(self.owner.peak, self.owner.under_way)
            trouble = self.owner.troubles.pop(0) if self.owner.troubles else None
        try:
            self.answer(body, trouble)
        finally:
            with self.owner.lock:
                self.owner.under_way -= 1

    def answer(self, body, trouble):
        if isinstance(trouble, int):
            return self.send(trouble, {"error": {"message": "a trouble"}})
        if set(body) - FIELDS or body["ignore_eos"] is not True or body["return_token_ids"] is not True:
            return self.send(400, {"error": {"message": f"unknown fields {set(body) - FIELDS}"}})
        if trouble == "drop":
            self.close_connection = True
            return self.connection.close()
        new = self.owner.write(body)
        stop = new[-1] if new[-1] in body["stop_token_ids"] else None
        end = {"finish_reason": "length" if stop is None else "stop", "stop_reason": stop}
        end |= {"stop_reason": None, "finish_reason": "stop"} if trouble == "eos" else {}
        shown = None if trouble == "text" else new
        whole = {"id": "1", "object": "text_completion", "created": 0, "model": body["model"]}
        if not body.get("stream"):
            return self.send(200, whole | {"choices": [{"index": 0, "text": "some", "token_ids": shown} | end]})
        self.stream([whole | {"choices": [{"index": 0, "text": "a", "token_ids": [t]} | (
            end if k == len(new) - 1 else {"finish_reason": None})]} for k, t in enumerate(new)], trouble)

    def stream(self, chunks, trouble):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        for k, chunk in enumerate(chunks):
            if trouble == "half" and k == len(chunks) // 2:
                break
            self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
        else:
            self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True
