"""A runner without a model: health, the warm-up endpoints, and faults on demand.

Standard library only, so that it starts in a few hundredths of a second. Faults are ``options`` of its spec:
``exit`` (status at once), ``ignore_sigterm``, ``child`` (starts one that sleeps), ``hang_file`` and
``wrong_file`` (while the file exists, health checks get no answer; warm-ups get an empty one). It sleeps and
wakes as a real one does; while ``busy_file`` exists it has a request in hand, and while ``slow_file`` does,
waking takes its time. Each answer says whose it is (``x-replica``), and ``GET /seen`` how many requests came,
by what stands before the first '-' of their ids; ``work_s`` is what each takes.
"""

import argparse
import collections
import http.server
import json
import os
import signal
import socketserver
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import ClassVar

ANSWERS = {
    "/v1/chat/completions": {"choices": [{"message": {"role": "assistant", "content": "Hello."}}]},
    "/v1/completions": {"choices": [{"text": " a + b"}]},
    "/v1/embeddings": {"data": [{"embedding": [0.6, 0.8]}, {"embedding": [1.0, 0.0]}]},
    "/v1/detections": {"data": []},
    "/v1/audio/transcriptions": {"text": "hm"},
    "/v1/images/generations": {"data": [{"b64_json": "iVBORw0KGgo="}]},
}


class Handler(http.server.BaseHTTPRequestHandler):
    options: ClassVar[dict] = {}
    name: ClassVar[str] = ""
    seen: ClassVar[collections.Counter] = collections.Counter()
    asleep: ClassVar[threading.Event] = threading.Event()
    #: Falling asleep and waking wait for each other.
    turn: ClassVar[threading.Lock] = threading.Lock()
    protocol_version = "HTTP/1.1"

    def _exists(self, option):
        return option in self.options and Path(self.options[option]).exists()

    def do_GET(self):
        while self._exists("hang_file"):
            time.sleep(0.05)
        if self.path == "/seen":
            self._answer(dict(self.seen))
        elif self.path == "/is_sleeping":
            self._answer({"is_sleeping": self.asleep.is_set()})
        else:
            self._answer({"pid": os.getpid()})

    def do_POST(self):
        self.rfile.read(int(self.headers.get("content-length") or 0))
        if self.path.startswith("/sleep"):
            self._sleep()
        elif self.path == "/wake_up":
            with self.turn:
                while self._exists("slow_file"):
                    time.sleep(0.05)
                self.asleep.clear()
            self._answer({})
        elif self.asleep.is_set():
            self._answer({"error": {"code": "model_asleep"}}, 503)
        else:
            self.seen[self.headers.get("x-request-id", "").partition("-")[0]] += 1
            time.sleep(self.options.get("work_s", 0))
            self._answer({} if self._exists("wrong_file") else ANSWERS[self.path])

    def _sleep(self):
        if self._exists("busy_file"):
            self._answer({"error": {"message": "a request in hand"}}, 409)
        else:
            with self.turn:
                self.asleep.set()
            self._answer({})

    def _answer(self, data, status=200):
        body = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.send_header("content-type", "application/json")
        self.send_header("x-replica", self.name)
        self.end_headers()
        self.wfile.write(body)

    def address_string(self):
        return "unix"

    def log_message(self, *_):
        pass


class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    request_queue_size = 128


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--spec", type=Path, required=True)
    spec = json.loads(parser.parse_args().spec.read_text())
    options = Handler.options = spec["options"]
    Handler.name = Path(spec["socket"]).stem
    if "exit" in options:
        print("the fake has no weights", file=sys.stderr)
        sys.exit(options["exit"])
    if options.get("child"):
        subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
    with Server(spec["socket"], Handler) as server:
        ended = threading.Event()
        if options.get("ignore_sigterm"):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        else:
            signal.signal(signal.SIGTERM, lambda *_: ended.set())
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        while not ended.wait(3600):
            pass
    Path(spec["socket"]).unlink(missing_ok=True)


if __name__ == "__main__":
    main()
