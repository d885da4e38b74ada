"""`atv serve` at full load for an hour while adapters are replaced and removed: every answer is compared.

    PYTHONPATH=tests python tests/soak/serving_load.py --minutes 60

Not part of the gate. The server is a process of its own, with a tiny LLM with random weights. Clients ask as fast as
they are answered: the plain LLM, an adapter that stays, one that is replaced by another under the same name, and one
that comes and goes. An answer is right if it is the one that the LLM gave alone, to one client, with a version of the
adapter that was served between the request and its answer; for the adapter that comes and goes, "no such model" is
right too. Memory is that of the server's process.
"""

import argparse
import http.client
import json
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from conftest import byte_level_tokenizer
from serving import TEXTS, adapters

BASE, STAYS, CHANGES, GOES = "llm", "stays", "changes", "comes-and-goes"
VERSIONS = {STAYS: ("last",), CHANGES: ("answer", "all"), GOES: ("last:3",)}
TOKENS = 12


class Server:
    """A running `atv serve`."""

    def __init__(self, world: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", "atv", "serve", "--llm", world / "llm", "--dtype", "float32"]
        command += ["--port", self.port, "--adapters-from", world / "adapters"]
        self.log = (world / "log").open("w+")
        self.process = subprocess.Popen(list(map(str, command)), stdout=self.log, stderr=self.log)
        until = time.monotonic() + 120
        while time.monotonic() < until:
            try:
                if self.ask("GET", "/health")[0] == 200:
                    return
            except OSError:
                time.sleep(0.5)
        sys.exit(f"The server did not start: {self.said()[-2000:]}")

    def ask(self, method: str, path: str, body: Any = None, connection: Any = None) -> tuple[int, Any]:
        """Send a request; return status and JSON of the answer."""
        connection = connection or http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        connection.request(
            method, path, None if body is None else json.dumps(body), {"content-type": "application/json"}
        )
        answer = connection.getresponse()
        data = answer.read()
        return answer.status, json.loads(data) if data else None

    def answer(self, name: str, text: str, connection: Any = None) -> tuple[int, str]:
        """Return status and text of a completion."""
        body = {"model": name, "prompt": text, "query": text, "max_tokens": TOKENS, "temperature": 0}
        if name == BASE:
            del body["query"]
        status, found = self.ask("POST", "/v1/completions", body, connection)
        return status, found["choices"][0]["text"] if status == 200 else found["error"]["message"]

    def load(self, name: str, version: str) -> None:
        """Serve a version of an adapter."""
        status, found = self.ask("POST", "/v1/adapters", {"name": name, "folder": f"{name} {version}"})
        if status != 200:
            raise RuntimeError(f"The adapter {name} {version} could not be loaded: {status} {found}")

    def said(self) -> str:
        """What the server wrote."""
        self.log.flush()
        return Path(self.log.name).read_text()

    def memory(self) -> float:
        """MiB of its process."""
        return psutil.Process(self.process.pid).memory_info().rss / 2**20


class Soak:
    """Clients, and an operator who replaces adapters."""

    def __init__(self, server: Server, expected: dict[tuple[str, str, str], str], minutes: float) -> None:
        self.server, self.expected = server, expected
        self.until = time.monotonic() + 60 * minutes
        self.asked, self.served = 0, 0
        """Number of the version of `CHANGES` that was asked for last, and that is served for certain."""
        self.counts, self.wrong, self._lock = Counter[str](), list[str](), threading.Lock()

    def client(self, number: int) -> None:
        """Ask until the time is over."""
        draw, connection = random.Random(number), http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=120)
        while time.monotonic() < self.until:
            name, text = draw.choice((BASE, STAYS, CHANGES, GOES)), draw.choice(TEXTS)
            first = self.served
            try:
                status, said = self.server.answer(name, text, connection)
            except Exception as error:
                connection.close()
                self.count("lost", f"{name} {text!r}: {error!r}")
                time.sleep(0.5)
                continue
            if name == CHANGES:
                versions = {VERSIONS[name][number % 2] for number in range(first, self.asked + 1)}
            else:
                versions = set(VERSIONS.get(name, ("",)))
            if status == 200 and said in {self.expected[name, version, text] for version in versions}:
                self.count(f"right: {name}")
            elif status == 404 and name == GOES:
                self.count("right: not served then")
            elif status == 429:
                self.count("sent away with 429")
            else:
                self.count("wrong", f"{name} {text!r}: {status} {said!r}")

    def count(self, how: str, about: str = "") -> None:
        """Count an answer."""
        with self._lock:
            self.counts[how] += 1
            if about:
                self.wrong.append(about)

    def operate(self) -> None:
        """Replace one adapter, remove and load another, until the time is over or one of that fails."""
        try:
            self._replace()
        except Exception as error:
            self.count("wrong", f"The operator stopped: {error!r}")

    def _replace(self) -> None:
        draw = random.Random(-1)
        while time.monotonic() < self.until:
            self.asked += 1
            self.server.load(CHANGES, VERSIONS[CHANGES][self.asked % 2])
            self.served = self.asked
            self.count("replaced")
            status, found = self.server.ask("DELETE", f"/v1/adapters/{GOES}")
            if status != 200:
                self.count("wrong", f"removal: {status} {found}")
            time.sleep(draw.random())
            self.server.load(GOES, VERSIONS[GOES][0])
            time.sleep(draw.random())


def main() -> int:
    """Serve, ask, print counts and memory, and return 1 if an answer was wrong or lost or the server said an error."""
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("--minutes", type=float, default=60)
    asked.add_argument("--clients", type=int, default=16)
    chosen = asked.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        world = Path(folder)
        make_world(world)
        server = Server(world)
        try:
            expected = references(server)
            soak = Soak(server, expected, chosen.minutes)
            workers = [
                threading.Thread(target=soak.client, args=(number,), daemon=True) for number in range(chosen.clients)
            ]
            workers.append(threading.Thread(target=soak.operate, daemon=True))
            for worker in workers:
                worker.start()
            memory = []
            while time.monotonic() < soak.until:
                time.sleep(min(5.0, 3 * chosen.minutes))
                if server.process.poll() is not None:
                    soak.until = 0.0
                    break
                memory.append(server.memory())
                if len(memory) % 60 == 0:
                    print(f"{len(memory) // 12} minutes: {dict(soak.counts)}, {memory[-1]:.0f} MiB", flush=True)
            for worker in workers:
                worker.join()
            alive = server.process.poll() is None and server.ask("GET", "/health")[0] == 200
        finally:
            server.process.terminate()
            server.process.wait(60)
        said = server.said()
    missing = [
        each for each in ("replaced", *(f"right: {name}" for name in (BASE, *VERSIONS))) if not soak.counts[each]
    ]
    tenth = max(1, len(memory) // 10)
    begin, end = median(memory[tenth : 2 * tenth] or memory or [0.0]), median(memory[-tenth:] or [0.0])
    print(f"{dict(soak.counts)}; the server's memory {begin:.0f} MiB after a tenth, {end:.0f} MiB at the end")
    print("\n".join(soak.wrong[:20]))
    if missing:
        print(f"Never seen: {', '.join(missing)}")
    bad = bool(soak.wrong or missing) or "Traceback" in said or not alive
    print(
        "Traceback in the server's log:\n" + said[-3000:] if "Traceback" in said else "No traceback in the server's log"
    )
    return int(bad)


def make_world(world: Path) -> None:
    """Write the LLM and the versions of the adapters."""
    torch.manual_seed(0)
    llm, _, made = adapters(dtype=torch.float32, scale=4.0)  # so that most answers tell which vectors were added
    llm.save_pretrained(world / "llm")
    byte_level_tokenizer().save_pretrained(world / "llm")
    for name, versions in VERSIONS.items():
        for version in versions:
            made[version].save_pretrained(world / "adapters" / f"{name} {version}")


def references(server: Server) -> dict[tuple[str, str, str], str]:
    """Answers to one client, with each version of each adapter."""
    found = {}
    for name, versions in {BASE: ("",), **VERSIONS}.items():
        for version in reversed(versions):  # the first version stays
            if name != BASE:
                server.load(name, version)
            for text in TEXTS:
                status, said = server.answer(name, text)
                if status != 200:
                    sys.exit(f"{name} {version}: {status} {said}")
                found[name, version, text] = said
    steered = sum(found[key] != found[BASE, "", key[2]] for key in found if key[0] != BASE)
    one, other = ([found[CHANGES, version, text] for text in TEXTS] for version in VERSIONS[CHANGES])
    apart = sum(a != b for a, b in zip(one, other, strict=True))
    print(
        f"{len(found)} answers: vectors change {steered}; {apart} differ between the versions of {CHANGES}", flush=True
    )
    return found


if __name__ == "__main__":
    sys.exit(main())
