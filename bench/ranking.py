"""
How long does rank.py take to ask for everything? Beside asking for one thing after another.

    python bench/ranking.py     (about 2 minutes, all of it waiting)

A server on this machine answers every request after 200 ms: two votes for each of 100 groups of four. Its clock counts,
from the first request to the last answer, so start-up does not. `ratio: X` is the seconds of the faster of the two ways
that send one request at a time, a plain loop and --concurrency 1, over those of --concurrency 8. The first request goes
alone, so 7.7 is the most there can be.
"""

import argparse
import http.server
import json
import os
import re
import tempfile
import threading
import time

import requests
from common import read_rows, run, show

GROUPS, LATENCY = 100, 0.2  # of four stories; of the server, in seconds
bodies, times = [], []  # of all requests; of requests and answers


class Handler(http.server.BaseHTTPRequestHandler):
    """Of four stories it prefers the one with the greatest fear."""

    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True

    def do_POST(self):
        times.append(time.perf_counter())
        bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        fears = re.findall(r"a fear of (\d+)", bodies[-1]["messages"][-1]["content"])
        time.sleep(LATENCY)
        reply = f"BEST_ANSWER:[{'ABCD'[fears.index(max(fears))]}]\nREASONING:[It has a fear of {max(fears)}.]"
        data = json.dumps({"choices": [{"message": {"content": reply}, "finish_reason": "stop"}]}).encode()
        times.append(time.perf_counter())
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


def ask(path, url, concurrency):
    """Have rank.py ask the server; returns the seconds."""
    out = f"{path}.{concurrency}"
    times.clear()
    run("rank.py", path, "--base_url", url, "--out", out, "--concurrency", concurrency)
    for row in read_rows(out):
        texts = {label: story["text"] for label, story in row["stories"].items()}
        assert len(row["votes"]) == 2 and row["best"] == max(texts, key=texts.get), row
    return times[-1] - times[0]


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    http.server.ThreadingHTTPServer.request_queue_size = 64
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url, votes = f"http://127.0.0.1:{server.server_port}/v1", 2 * GROUPS
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "stories.jsonl")
        with open(path, "w", encoding="utf-8") as f:
            for i in range(4 * GROUPS):
                text = f"It was a night {'of rain ' * 90}and a fear of {i * 7919 % 10007:05}."  # all different
                f.write(json.dumps(dict(id=i, prompt="", text=text)) + "\n")
        one, eight, many = (ask(path, url, n) for n in (1, 8, 32))
    assert len(bodies) == 3 * votes
    times.clear()
    for body in bodies[:votes]:
        requests.post(f"{url}/chat/completions", json=body).raise_for_status()
    loop = times[-1] - times[0]
    show(
        ("", "seconds", "requests/s"),
        ("a plain loop", loop, votes / loop),
        ("rank.py --concurrency 1", one, votes / one),
        ("rank.py, 8 at a time", eight, votes / eight),
        ("rank.py --concurrency 32", many, votes / many),
    )
    print(f"ratio: {min(loop, one) / eight:.2f}")


if __name__ == "__main__":
    main()
