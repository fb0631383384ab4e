"""A server under many clients and every attack at once: python tests/chaos_run.py --seconds 600 --clients 200

Starts `mm1 serve` on loopback with a small model, sends honest requests whose answers are known, and between them
half-open connections, bad bodies, images that bomb, prompts of 8,192 tokens, readers that stop reading, and clients
that leave. Ends with one line of JSON: what honest clients got, the longest silence of a running stream, the memory
of the server over time, and how /health answered. Exit 1 if an honest request failed or waited more than its share.
"""

import argparse
import asyncio
import base64
import contextlib
import json
import os
import random
import re
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from pathlib import Path

KEY = "chaos"
CONTEXT = 16_384
LONG_PROMPT = 8_192
PATIENCE = 120  # seconds that an honest request may take, on a machine that is busy with attacks
HOLD = 5  # seconds that an attacker holds a connection


def save_model(folder: Path) -> None:
    """Write a checkpoint of a small model whose context is large."""
    from dataclasses import replace

    from small import FOLDER, small_mm1

    from mm1.engine.run_config import to_dict
    from mm1.engine.train import checkpoint

    model = small_mm1(seed=5)
    table = {"model": to_dict(replace(model.config, context=CONTEXT))}
    texts = {"config.json": json.dumps(table), "tokenizer.json": (FOLDER / "tokenizer.json").read_text()}
    checkpoint.write(folder, {"model.safetensors": model.state_dict()}, texts)


def png(side: int, shade: int) -> bytes:
    """Return an image of one shade."""
    rows = b"".join(b"\0" + bytes([shade, 255 - shade, 128]) * side for _ in range(side))
    return _png(side, side, zlib.compress(rows))


def bomb() -> bytes:
    """Return an image whose header promises 30,000 by 30,000 pixels."""
    return _png(30_000, 30_000, zlib.compress(bytes(1 << 20)))


def _png(width: int, height: int, data: bytes) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def chat(text: str, images: tuple[bytes, ...] = (), **more) -> dict:
    urls = [f"data:image/png;base64,{base64.b64encode(image).decode()}" for image in images]
    content = [{"type": "image_url", "image_url": {"url": url}} for url in urls] + [{"type": "text", "text": text}]
    return {"messages": [{"role": "user", "content": content}], "template": "none", **more}


class Server:
    """The process under attack."""

    def __init__(self, checkpoint: Path, log: Path):
        environment = os.environ | {"MM1_API_KEY": KEY, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "mm1.cli", "serve", str(checkpoint), "--port", "0", "--queue", "1024",
                   "--batch", "32", "--tokens", str(4 * CONTEXT)]  # fmt: skip
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log.open("w"), env=environment, text=True
        )
        assert self.process.stdout
        while line := self.process.stdout.readline():
            if found := re.search(r"http://127\.0\.0\.1:(\d+)", line):
                self.port = int(found[1])
                return
        raise RuntimeError(f"the server did not start: {log.read_text()[-2000:]}")

    @property
    def memory(self) -> float:
        """Return resident MB of the server itself."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


class Clients:
    """Honest ones and attackers, and what became of them."""

    def __init__(self, port: int, end: float, seed: int):
        self.port, self.end, self.random = port, end, random.Random(seed)
        self.count: Counter[str] = Counter()
        self.failed: list[str] = []
        self.seconds: list[float] = []  # of honest requests
        self.silences: list[float] = []  # between two pieces of a running stream
        self.health: list[float] = []
        self.known: dict[str, str] = {}  # answers by request: the same request has the same answer

    # How bytes travel.

    async def open(self):
        return await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 22)

    def head(self, method: str, path: str, size: int, key: str = KEY) -> bytes:
        return (
            f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {size}\r\nConnection: close\r\n\r\n"
        ).encode()

    async def ask(self, method: str, path: str, body: bytes = b"", key: str = KEY) -> tuple[int, bytes]:
        reader, writer = await self.open()
        try:
            writer.write(self.head(method, path, len(body), key) + body)
            await writer.drain()
            whole = await reader.read()
        finally:
            writer.close()
        first, _, rest = whole.partition(b"\r\n\r\n")
        return int(first.split(b" ", 2)[1]), rest

    # Honest clients.

    async def honest(self) -> None:
        kinds = {"text": 6, "image": 3, "stream": 4, "score": 2, "models": 1, "long": 0.4}
        while time.monotonic() < self.end:
            [kind] = self.random.choices(list(kinds), list(kinds.values()))
            begun = time.monotonic()
            try:
                async with asyncio.timeout(PATIENCE):
                    await getattr(self, f"honest_{kind}")()
                self.count[kind] += 1
            except Exception as error:
                self.failed.append(f"{kind}: {type(error).__name__}: {str(error)[:200]}")
            self.seconds.append(time.monotonic() - begun)
            await asyncio.sleep(self.random.uniform(0, 0.5))

    async def answered(self, path: str, asked: dict) -> dict:
        body = json.dumps(asked).encode()
        status, answer = await self.ask("POST", path, body)
        if status != 200:
            raise AssertionError(f"{status} {answer[:160]!r}")
        return json.loads(answer)

    def same(self, asked: dict, answer: str) -> None:
        name = json.dumps(asked, sort_keys=True)
        if self.known.setdefault(name, answer) != answer:
            raise AssertionError(f"{answer!r}, before {self.known[name]!r}")

    async def honest_text(self) -> None:
        asked = chat(f"number {self.random.randrange(40)} is", max_tokens=self.random.choice((4, 12, 40)))
        self.same(asked, (await self.answered("/v1/chat/completions", asked))["choices"][0]["message"]["content"])

    async def honest_image(self) -> None:
        images = tuple(png(16, self.random.randrange(16)) for _ in range(self.random.randrange(1, 3)))
        asked = chat("the picture shows", images, max_tokens=8)
        self.same(asked, (await self.answered("/v1/chat/completions", asked))["choices"][0]["message"]["content"])

    async def honest_score(self) -> None:
        asked = {"prompt": [[1, *(4 + (7 * i) % 300 for i in range(self.random.randrange(5, 40)))]], "max_tokens": 1,
                 "echo": True, "logprobs": 1}  # fmt: skip
        found = (await self.answered("/v1/completions", asked))["choices"][0]["logprobs"]["token_logprobs"]
        if found[0] is not None or any(x is None or x > 0 for x in found[1:]):
            raise AssertionError(f"log-probabilities {found[:4]}")

    async def honest_models(self) -> None:
        status, _ = await self.ask("GET", "/v1/models")
        if status != 200:
            raise AssertionError(str(status))

    async def honest_long(self) -> None:
        words = " ".join(["one", "two", "three", "four", "five"][i % 5] for i in range(LONG_PROMPT // 2))
        asked = chat(f"{self.random.randrange(1 << 30)} {words}", max_tokens=2)
        await self.answered("/v1/chat/completions", asked)

    async def honest_stream(self) -> None:
        await self.stream(self.random.choice((20, 200)), None)

    async def stream(self, tokens: int, leave_after: int | None) -> None:
        """Read a stream, and how long it was silent between pieces; leave_after: pieces."""
        asked = chat(f"stream {self.random.randrange(40)}", max_tokens=tokens, stream=True)
        body = json.dumps(asked).encode()
        reader, writer = await self.open()
        try:
            writer.write(self.head("POST", "/v1/chat/completions", len(body)) + body)
            status = int((await reader.readline()).split(b" ", 2)[1])
            if status != 200:
                raise AssertionError(f"{status} {(await reader.read(400))[-160:]!r}")
            pieces, text, last = 0, "", None
            while line := await reader.readline():
                if not line.startswith(b"data: {"):
                    if line.startswith(b"data: [DONE]"):
                        break
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise AssertionError(f"in a stream: {event['error']}")
                now = time.monotonic()
                piece = event["choices"][0]["delta"].get("content")
                if piece:
                    if last is not None:
                        self.silences.append(now - last)
                    last, pieces, text = now, pieces + 1, text + piece
                if pieces == leave_after:
                    return
            else:
                raise AssertionError("a stream ended without [DONE]")
            self.same(asked | {"stream": 0}, text)
        finally:
            writer.close()

    # Attackers. What they get is counted; the server must live on.

    async def attacker(self) -> None:
        kinds = [name for name in dir(self) if name.startswith("attack_")]
        while time.monotonic() < self.end:
            kind, answer = self.random.choice(kinds), "no answer"
            with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError, ValueError, IndexError):
                async with asyncio.timeout(4 * HOLD):
                    answer = await getattr(self, kind)()
            self.count[f"{kind} {answer}"] += 1
            await asyncio.sleep(self.random.uniform(0, 0.3))

    async def hold(self, data: bytes) -> None:
        _, writer = await self.open()
        try:
            writer.write(data)
            await asyncio.sleep(HOLD)
        finally:
            writer.close()

    async def attack_half_open_head(self) -> None:
        await self.hold(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nX-A: ")

    async def attack_nothing_is_sent(self) -> None:
        await self.hold(b"")

    async def attack_slow_body(self) -> None:
        await self.hold(self.head("POST", "/v1/chat/completions", 100_000) + b'{"messages": [')

    async def attack_tiny_chunks(self) -> None:
        """Sends without a pause what is slow to read, without a key."""
        _, writer = await self.open()
        try:
            writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
            end = time.monotonic() + HOLD
            while time.monotonic() < end:
                writer.write(b"1\r\nx\r\n" * 10_000)
                await writer.drain()
        finally:
            writer.close()

    async def attack_many_slow_bodies(self) -> None:
        await asyncio.gather(*(self.attack_slow_body() for _ in range(40)))

    async def attack_does_not_read_a_large_answer(self) -> None:
        asked = {"prompt": [[1, *([7] * 2000)]], "max_tokens": 0, "echo": True, "logprobs": 5, "n": 4}
        body = json.dumps(asked).encode()
        await self.hold(self.head("POST", "/v1/completions", len(body)) + body)

    async def attack_garbage(self) -> None:
        await self.hold(self.random.randbytes(2000))

    async def post(self, body: bytes | dict, key: str = KEY) -> int:
        """Return the status that a chat is answered with."""
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        return (await self.ask("POST", "/v1/chat/completions", body, key))[0]

    async def attack_no_key(self) -> int:
        return await self.post(chat("x"), key="wrong")

    async def attack_deep_json(self) -> int:
        return await self.post(b"[" * 200_000)

    async def attack_large_text(self) -> int:
        return await self.post(chat("word " * 600_000))

    async def attack_huge_body(self) -> None:
        await self.hold(self.head("POST", "/v1/chat/completions", 1 << 34) + bytes(1 << 20))

    async def attack_one_long_word(self) -> int:
        return await self.post(chat("x" * 12_000, max_tokens=1))

    async def attack_image_bomb(self) -> int:
        return await self.post(chat("x", (bomb(),), max_tokens=1))

    async def attack_broken_images(self) -> int:
        return await self.post(chat("x", tuple(png(64, i)[: 60 + i] for i in range(16)), max_tokens=1))

    async def attack_many_choices(self) -> int:
        return await self.post(chat("x", n=16, max_tokens=60))

    async def attack_leaves_a_stream(self) -> None:
        await self.stream(400, leave_after=3)

    async def attack_does_not_read(self) -> None:
        body = json.dumps(chat("x", max_tokens=2000, stream=True)).encode()
        await self.hold(self.head("POST", "/v1/chat/completions", len(body)) + body)

    async def attack_leaves_a_long_prompt(self) -> None:
        body = json.dumps(chat("one two " * (LONG_PROMPT // 4), max_tokens=2)).encode()
        _, writer = await self.open()
        writer.write(self.head("POST", "/v1/chat/completions", len(body)) + body)
        await asyncio.sleep(self.random.uniform(0, 1))
        writer.close()

    async def attack_schema(self) -> int:
        deep: dict = {"type": "integer"}
        for _ in range(12):  # 4,096 numbers
            deep = {"type": "object", "properties": {"a": deep, "b": deep}}
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "array", "items": deep}}}
        return await self.post(chat("x", max_tokens=4, response_format=form))

    async def attack_slow_schema(self) -> int:
        slow = {
            "type": "object",
            "properties": {"a": {"type": "integer", "multipleOf": self.random.randrange(10, 1000)}},
        }
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": slow}}
        return await self.post(chat("x", max_tokens=40, response_format=form))

    # Who watches.

    async def watch(self) -> None:
        while time.monotonic() < self.end:
            begun = time.monotonic()
            try:
                async with asyncio.timeout(PATIENCE):
                    status, answer = await self.ask("GET", "/health")
                if status != 200:
                    self.failed.append(f"health: {status} {answer[:160]!r}")
            except Exception as error:
                self.failed.append(f"health: {type(error).__name__}: {error}")
            self.health.append(time.monotonic() - begun)
            await asyncio.sleep(0.5)


async def chaos(server: Server, clients: int, seconds: float, seed: int) -> dict:
    running = Clients(server.port, time.monotonic() + seconds, seed)
    memory: list[float] = []

    async def remember() -> None:
        while time.monotonic() < running.end:
            memory.append(server.memory)
            await asyncio.sleep(max(seconds / 60, 0.5))

    honest = max(clients // 4, 1)
    work = [running.watch(), remember(), *(running.honest() for _ in range(honest))]
    await asyncio.gather(*work, *(running.attacker() for _ in range(clients - honest)))
    third = max(len(memory) // 3, 1)
    return {
        "clients": clients, "seconds": seconds, "count": dict(sorted(running.count.items())),
        "failed": len(running.failed),
        "failures": [f"{n} times {why}" for why, n in Counter(running.failed).most_common(8)],
        "honest_seconds": _spread(running.seconds), "silence_seconds": _spread(running.silences),
        "health_seconds": _spread(running.health),
        "memory_mb": {"start": round(memory[0]), "middle": round(max(memory[third : 2 * third] or memory)),
                      "last_third": round(max(memory[-third:]))},
    }  # fmt: skip


def _spread(values: list[float]) -> dict:
    ordered = sorted(values) or [0.0]
    return {"median": round(ordered[len(ordered) // 2], 3), "p99": round(ordered[int(0.99 * (len(ordered) - 1))], 3),
            "most": round(ordered[-1], 3), "count": len(values)}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder) / "checkpoint")
        log = Path(folder) / "server.log"
        server = Server(Path(folder) / "checkpoint", log)
        try:
            found = asyncio.run(chaos(server, options.clients, options.seconds, options.seed))
        finally:
            code = server.stop()
        found |= {"exit": code, "log": log.read_text()[-2000:]}
    print(json.dumps(found, indent=1 if options.out is None else None))
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    memory = found["memory_mb"]
    flat = memory["last_third"] < 1.05 * memory["middle"] + 10  # 630 and 629 MB in a run of ten minutes
    return 0 if flat and not found["failed"] and code == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
