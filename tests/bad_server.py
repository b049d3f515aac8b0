"""A real HTTP server on localhost that speaks chat completions and misbehaves on purpose.

What goes wrong is drawn from (seed, question, how often it was asked), so that two runs meet the same
troubles. It counts what it was asked, what it delivered, and what it charged: a reply is charged as
soon as it was thought of, whether or not it arrives. Run as a program it serves until it is killed
and answers GET /counts.
"""

import asyncio
import json
import random
import sys
import threading
import time

# Troubles: 429 (come back in a second), 500, any other status, html (a gateway's page), drop, half (a JSON
# document), empty (no thinking), cut (finish_reason length), hang, drip (a byte now and then).
PROMPT, REPLY = 11, 90  # tokens of every prompt and every reply
USD_IN, USD_OUT = 1.0, 10.0  # US dollars per million


HELD = 20.0  # seconds that a reply is held at most


class BadServer:
    """`odds` maps a trouble to its probability; everything else is answered well. Replies wait while
    `hold(server)` is true, so that a test need not hope that two things happen at the same time."""

    def __init__(self, odds=None, seed=0, think=0.0, field="reasoning_content", echo=None, hold=None):
        self.odds, self.seed, self.think, self.field, self.echo = odds or {}, seed, think, field, echo
        self.hold = hold or (lambda server: False)
        self.asked, self.delivered, self.troubles = {}, {}, {}
        self.charged, self.under_way, self.peak, self.too_soon = 0.0, 0, 0, 0
        self.not_before, self.bodies, self.headers = {}, [], []
        ready = threading.Event()
        self.thread = threading.Thread(target=self._run, args=(ready,), daemon=True)
        self.thread.start()
        assert ready.wait(10)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)

    def _run(self, ready):
        self.loop = asyncio.new_event_loop()
        server = self.loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=500))
        self.port = server.sockets[0].getsockname()[1]
        ready.set()
        self.loop.run_forever()
        server.close()
        self.loop.run_until_complete(self._hang_up())
        self.loop.close()

    async def _hang_up(self):
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    def trouble(self, question):
        number = self.asked[question] = self.asked.get(question, 0) + 1
        draw = random.Random(f"{self.seed}/{question}/{number}").random()
        for name, odds in self.odds.items():
            draw -= odds
            if draw < 0:
                self.troubles[name] = self.troubles.get(name, 0) + 1
                return name
        return None

    async def _serve(self, reader, writer):
        try:
            while await self._one(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def _one(self, reader, writer):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        lines = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if line)
        if head.startswith("GET"):
            return self._send(writer, 200, json.dumps(self.counts()))
        body = json.loads(await reader.readexactly(int(lines["content-length"])))
        self.bodies.append(body)
        self.headers.append(lines)
        self.under_way += 1
        self.peak = max(self.peak, self.under_way)
        try:
            return await self._answer(reader, writer, body)
        finally:
            self.under_way -= 1

    async def _answer(self, reader, writer, body):
        question = (body["messages"] or [{"content": ""}])[-1]["content"]
        self.too_soon += time.monotonic() < self.not_before.pop(question, 0.0)
        trouble = self.trouble(question)
        if trouble == "429":
            self.not_before[question] = time.monotonic() + 1
            return self._send(writer, 429, '{"error": {"message": "slow down"}}', "Retry-After: 1\r\n")
        if trouble == "500":
            return self._send(writer, 500, '{"error": {"message": "oh"}}')
        if trouble and trouble.isdigit():  # any other status; may echo what it should not
            message = json.dumps({"error": {"message": f"no {self.echo}"}})
            return self._send(writer, int(trouble), message)
        until = time.monotonic() + HELD
        while self.hold(self) and time.monotonic() < until:
            await asyncio.sleep(0.005)
        await asyncio.sleep(self.think)
        self.charged += (PROMPT * USD_IN + REPLY * USD_OUT) / 1e6
        if trouble == "hang":
            await reader.read(1)  # ends when the client hangs up
            return False
        if trouble == "drip":
            writer.write(b"HTTP/1.1 200 x\r\nContent-Type: application/json\r\nContent-Length: 9999\r\n\r\n")
            while not writer.transport.is_closing():
                writer.write(b" ")
                await asyncio.sleep(0.05)
            return False
        if trouble == "drop":
            writer.transport.abort()
            return False
        if trouble == "html":
            return self._send(writer, 200, "<html>gateway</html>", kind="text/html")
        text = json.dumps(self.completion(question, trouble))
        if trouble == "half":
            return self._send(writer, 200, text[: len(text) // 2])
        self.delivered[question] = self.delivered.get(question, 0) + 1
        return self._send(writer, 200, text)

    def completion(self, question, trouble):
        message = {"role": "assistant", "content": f"Answer: {len(question)}"}
        thinking = "" if trouble == "empty" else f"So {question} has {len(question)} characters"
        if self.echo:
            thinking += f" {self.echo}"
        if self.field.startswith("<"):
            message["content"] = f"{self.field}\n{thinking}\n{self.field.replace('<', '</')}\n{message['content']}"
        else:
            message[self.field] = thinking
        usage = {"prompt_tokens": PROMPT, "completion_tokens": REPLY, "total_tokens": PROMPT + REPLY}
        return {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "usage": usage,
                "choices": [{"index": 0, "message": message, "finish_reason": "length" if trouble == "cut" else "stop"}]}

    def _send(self, writer, status, text, extra="", kind="application/json"):
        body = text.encode()
        writer.write(f"HTTP/1.1 {status} x\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
                     f"{extra}\r\n".encode() + body)
        return True

    def counts(self):
        return {"asked": self.asked, "delivered": self.delivered, "charged": self.charged,
                "troubles": self.troubles, "peak": self.peak, "too_soon": self.too_soon}


if __name__ == "__main__":
    with BadServer(json.loads(sys.argv[1]), think=float(sys.argv[2])) as server:
        print(server.url, flush=True)
        threading.Event().wait()
