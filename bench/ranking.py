"""
How long does rank.py take to ask for everything? Beside asking for one thing after another.

    python bench/ranking.py     (about 2 minutes, all of it waiting)

A server on this machine answers every chat completion after 200 ms. 400 stories make 100 groups, and two votes each
make 200 requests. A plain loop of requests.post sends them one after another, then rank.py does with --concurrency 1, 8
and 32, in this process: start-up is not counted. Checked: each way takes two answers a group, and chooses the stories
that the server prefers. The last line is `ratio: X`: the seconds of the faster of the two ways that send one request at
a time, over those of --concurrency 8. The first request goes alone, so 7.7 is the most there can be.
"""

import argparse
import contextlib
import http.server
import io
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version, disable_nagle_algorithm, latency = "HTTP/1.1", True, 0.2

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        time.sleep(self.latency)
        fears = list(map(int, re.findall(r"a fear of (\d+)", body["messages"][-1]["content"])))
        reply = f"BEST_ANSWER:[{'ABCD'[fears.index(max(fears))]}]\nREASONING:[It has a fear of {max(fears)}.]"
        choice = {"index": 0, "message": {"role": "assistant", "content": reply}, "finish_reason": "stop"}
        data = json.dumps({"choices": [choice], "usage": {"prompt_tokens": 1000, "completion_tokens": 30}}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


def serve(pipe, latency):
    Handler.latency = latency
    http.server.ThreadingHTTPServer.request_queue_size = 64
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        pipe.send(server.server_port)
        server.serve_forever()


def main():
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--groups", type=int, default=100, help="of four stories (default: 100)")
    flags.add_argument("--latency", type=float, default=0.2, help="of the server, in seconds (default: 0.2)")
    flags = flags.parse_args()
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.Process(target=serve, args=(theirs, flags.latency), daemon=True)
    server.start()
    url = f"http://127.0.0.1:{ours.recv()}/v1"
    import requests

    import rank

    fears = [i * 7919 % 10007 for i in range(4 * flags.groups)]  # all different
    stories = [
        dict(id=i, prompt="", text=f"It was a night {'of rain ' * 90}and a fear of {x}.") for i, x in enumerate(fears)
    ]
    groups = rank.make_groups(stories, 1337)
    best = [max(group, key=lambda label: fears[group[label]["id"]]) for group in groups]
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "stories.jsonl")
        with open(path, "w") as f:
            f.writelines(json.dumps(story) + "\n" for story in stories)

        def ask(concurrency):
            """rank.py as from the command line; its seconds, requests, and whether it chose what it should."""
            out = os.path.join(folder, f"{concurrency}.jsonl")
            sys.argv = ["rank.py", path, "--base_url", url, "--out", out, "--concurrency", str(concurrency)]
            start = time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                rank.main()
            seconds = time.perf_counter() - start
            with open(out) as f:
                found = [json.loads(line) for line in f]
            return seconds, sum(len(row["votes"]) for row in found), [row["best"] for row in found] == best

        sys.argv = ["rank.py", path]
        settings = rank.get_flags()
        start, right = time.perf_counter(), True
        for g, group in enumerate(groups):
            for vote in range(2):
                order = rank.ORDERS[4][vote]
                body = rank.make_body(settings, (), group, order)
                reply = requests.post(f"{url}/chat/completions", json=body).json()["choices"][0]["message"]["content"]
                right &= order["ABCD".index(rank.read_reply(reply, "ABCD")[0])] == best[g]
        rows["a plain loop"] = time.perf_counter() - start, 2 * flags.groups, right
        for concurrency in (1, 8, 32):
            rows[f"rank.py --concurrency {concurrency}"] = ask(concurrency)
    server.terminate()
    print(f"{flags.groups} groups, {2 * flags.groups} votes, {flags.latency * 1000:.0f} ms each\n")
    print(f"{'way':28}{'seconds':>9}{'requests/s':>12}   all right")
    for name, (seconds, count, right) in rows.items():
        right &= count == 2 * flags.groups
        print(f"{name:28}{seconds:9.2f}{count / seconds:12.1f}   {'yes' if right else 'NO'}")
    one_by_one = min(rows["a plain loop"][0], rows["rank.py --concurrency 1"][0])
    print(f"ratio: {one_by_one / rows['rank.py --concurrency 8'][0]:.2f}")
    raise SystemExit(0 if all(right and count == 2 * flags.groups for _, count, right in rows.values()) else 1)


if __name__ == "__main__":
    main()
