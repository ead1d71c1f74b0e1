"""A server of vLLM's protocol in this process, on the loopback interface."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch


class ProtocolServer:
    """
    Answers like vLLM's `/v1/completions` with `prompt_logprobs`, computed by a real model, and fails on request.

    `script` holds what happens to the next requests: a status code, `"reset"`, or a callable run before the answer.
    Every answer takes `latency` seconds (and the model's time only once for a prompt while `table` is a dictionary), and `most_at_once` is how many requests waited for one at a time.
    """

    def __init__(self, model, max_logprobs=20, max_model_len=64, port=0, key=None, name="teacher", latency=0.0):
        self.model, self.max_logprobs, self.max_model_len = model, max_logprobs, max_model_len
        self.key, self.name, self.latency = key, name, latency
        self.script, self.requests = [], []
        self.table = None
        self.waiting = self.most_at_once = 0
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def reply(self, code, data, headers=()):
                body = json.dumps(data).encode()
                self.send_response(code)
                for pair in headers:
                    self.send_header(*pair)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def refuse(self, code, message):
                self.reply(code, {"error": {"message": message, "code": code}})

            def do_GET(self):
                if outer.key and self.headers.get("Authorization") != f"Bearer {outer.key}":
                    return self.refuse(401, "Unauthorized")
                if self.path == "/version":
                    return self.reply(200, {"version": "9.9"})
                return self.reply(
                    200,
                    {"data": [{"id": outer.name, "root": "/models/teacher-x", "max_model_len": outer.max_model_len}]},
                )

            def do_POST(self):
                with outer.lock:
                    outer.waiting += 1
                    outer.most_at_once = max(outer.most_at_once, outer.waiting)
                time.sleep(outer.latency)
                with outer.lock:
                    outer.waiting -= 1
                self.complete()

            def complete(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    outer.requests.append(request)
                    step = outer.script.pop(0) if outer.script else None
                if step == "reset":
                    self.connection.close()
                    return None
                if isinstance(step, int):
                    return self.reply(step, {"error": {"message": "not now"}}, [("Retry-After", "0")])
                if callable(step):
                    step()
                k = request["prompt_logprobs"]
                if k > outer.max_logprobs:
                    return self.refuse(
                        400,
                        f"Requested prompt logprobs of {k}, which is greater than max allowed: {outer.max_logprobs}",
                    )
                if request["model"] != outer.name:
                    return self.refuse(404, f"The model `{request['model']}` does not exist.")
                choices = [
                    {"index": i, "prompt_logprobs": outer.answer(p, k)} for i, p in enumerate(request["prompt"])
                ]
                return self.reply(200, {"choices": choices[::-1]})

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, prompt, k):
        if self.table is None:
            return self.score(prompt, k)
        if (*prompt, k) not in self.table:
            self.table[(*prompt, k)] = self.score(prompt, k)
        return self.table[(*prompt, k)]

    def score(self, prompt, k):
        with torch.inference_mode():
            logprobs = self.model(torch.tensor([prompt])).logits[0].log_softmax(-1)
        entries = [None]
        for t in range(1, len(prompt)):
            row = logprobs[t - 1]
            order = row.argsort(descending=True, stable=True)
            kept = {int(i): rank for rank, i in enumerate(order[:k], 1)}
            kept.setdefault(prompt[t], int((row >= row[prompt[t]]).sum()))
            entries.append({str(i): {"logprob": float(row[i]), "rank": rank} for i, rank in kept.items()})
        return entries

    def stop(self):
        self.server.shutdown()
        self.server.server_close()
