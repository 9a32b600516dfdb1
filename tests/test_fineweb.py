"""data/fineweb.py and a real HTTP server that resumes, changes, cuts, lies, trickles, or sends it elsewhere."""

import functools
import http.server
import os
import pathlib
import re
import resource
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import requests

import data.fineweb as script
import data.hellaswag as hellaswag

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDER = "/mirror/datasets/kjj0/fineweb10B-gpt2/resolve/main/"
VAL, ONE, TWO = "fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin"
HOSTILE = [{"redirect": f"http://{host}/"} for host in ("", "[::1", "a" * 99 + ".example", "127.0.0.1:99999")]
HOSTILE += [{"redirect": "/"}, {"status": 403}, {"status": 503}, {"promise": 99}, {"promise": -3000}, {"trickle": b"x"}]
HOSTILE += [{"trickle": b"X-Header: x\r\n"}]
LIMIT = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (100_000, 100_000))  # fails as a full disk does


def shard(seed, tokens=150_000):
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, tokens
    return header.tobytes() + np.random.default_rng(seed).integers(50257, size=tokens).astype("<u2").tobytes()


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers as RFC 9110 says, but for what the test has put into the server's `odd`."""

    def do_GET(self):
        server, odd = self.server, self.server.odd.get(os.path.basename(self.path), {})
        server.asked.append((self.path, self.headers["Range"]))
        body, headers, status = server.files.get(self.path, b""), {}, 200 if self.path in server.files else 404
        version = f'"{hash(body)}"'
        if self.headers["Range"] and (self.headers["If-Range"] == version or "ignores If-Range" in odd):
            start = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1]) + odd.get("shift", 0)
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
            body, status = body[start:], 206
        if "redirect" in odd:
            status, headers["Location"] = 302, odd["redirect"]
        if "trickle" not in odd:
            headers["Content-Length"] = str(len(body) + odd.get("promise", 0))
        self.send_response(odd.get("status", status))
        for key, value in {server.version: version, **headers}.items():
            self.send_header(key, value)
        if odd.get("trickle") != b"X-Header: x\r\n":
            self.end_headers()
        while "trickle" in odd and not server.free.wait(0.1):
            self.flush_headers()
            self.wfile.write(odd["trickle"])
        self.wfile.write(body[: odd.get("cut")])
        if "cut" in odd:
            server.free.wait(60)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.handle_error = lambda *_: None  # a client that was killed
        server.files = {FOLDER + VAL: shard(0), FOLDER + ONE: shard(1), FOLDER + TWO: shard(2, tokens=1000)}
        server.odd, server.asked, server.version, server.free = {}, [], "ETag", threading.Event()
        server.url = f"http://127.0.0.1:{server.server_port}"
        for name, value in (("NO_PROXY", "127.0.0.1"), ("HF_ENDPOINT", f"{server.url}/mirror/")):
            monkeypatch.setenv(name, value)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.free.set()
        server.shutdown()


def start(name, *arguments, **settings):
    command = [sys.executable, ROOT / "data" / name, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **settings)


def run(*arguments, code=0, name="fineweb.py", lines=1, **settings):
    """What is said: with an error code, so many lines on stderr."""
    process = start(name, *arguments, **settings)
    out, error = process.communicate(timeout=50)
    assert process.returncode == code and (code == 0 or error.count("\n") == lines), error
    return error if code else out


def get(server, path, retries=1):
    script.download(server.url + FOLDER + ONE, str(path), retries)
    assert path.read_bytes() == server.files[FOLDER + ONE] and os.listdir(path.parent) == [path.name]


def test_shards_arrive_and_are_then_passed_over(server, tmp_path):
    out = tmp_path / "new" / "folder"
    run(0, "--out_dir", out)
    (out / f"{ONE}.part").write_bytes(server.files[FOLDER + ONE] + b"more")
    (out / f"{TWO}.part").write_bytes(server.files[FOLDER + TWO])  # killed before it got its name
    run(2, "--out_dir", out)
    assert {FOLDER + path.name: path.read_bytes() for path in out.iterdir()} == server.files
    assert server.asked == [(FOLDER + VAL, None), (FOLDER + ONE, None)]
    (out / TWO).write_bytes(shard(2)[:-2])  # not whole: fetched again
    server.asked.clear()
    assert "3 of 3 shards" in run(2, "--out_dir", out)
    assert server.asked == [(FOLDER + TWO, None)] and (out / TWO).read_bytes() == server.files[FOLDER + TWO]


@pytest.mark.parametrize("version", ["ETag", "Last-Modified", "None"])
def test_after_a_kill_the_same_command_goes_on(server, tmp_path, version):
    name, code = (signal.SIGINT, 130) if version == "ETag" else (signal.SIGKILL, -9)
    server.version, server.odd, part = version, {VAL: {"cut": 200_000}}, tmp_path / f"{VAL}.part"
    process = start("fineweb.py", 0, "--out_dir", tmp_path)
    while not (part.exists() and part.stat().st_size > 100_000):
        time.sleep(0.01)
    assert "another run" in run(0, "--out_dir", tmp_path, code=1)  # and leaves the part of the first alone
    process.send_signal(name)
    assert process.wait(5) == code
    process.communicate()
    server.odd, have = {}, part.stat().st_size
    run(0, "--out_dir", tmp_path)
    assert [asked for _, asked in server.asked] == [None, None if version == "None" else f"bytes={have}-"]
    assert (tmp_path / VAL).read_bytes() == server.files[FOLDER + VAL] and os.listdir(tmp_path) == [VAL]


@pytest.mark.parametrize("odd", [{}, {"ignores If-Range": 1}, {"shift": 1000}, {"shift": 1000, "ignores If-Range": 1}])
def test_nothing_is_added_to_a_part_of_another_file(server, tmp_path, monkeypatch, odd):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    server.odd = {ONE: {"cut": 200_000}}
    server.free.set()
    with pytest.raises(requests.RequestException):
        get(server, tmp_path / "x", retries=0)
    server.odd = {ONE: odd}
    if odd != {"shift": 1000}:
        server.files[FOLDER + ONE] = shard(3)
    get(server, tmp_path / "x")
    assert [asked is not None for _, asked in server.asked] == ([False, True, False] if odd else [False, True])


def test_what_is_no_whole_shard_gets_no_final_name(server, tmp_path):
    good = shard(1)
    for wrong in (b"<html>" * 999, good[:4] + b"\2" + good[5:], good[:-2], good + b"\0\0", good[:1000]):
        server.files[FOLDER + ONE] = wrong
        with pytest.raises(ValueError, match="20240520|bytes, but 301,024"):
            get(server, tmp_path / "x")
        assert os.listdir(tmp_path) == [], "a part that is wrong would never become right"


@pytest.mark.parametrize("odd", HOSTILE, ids=str)
def test_servers_that_never_deliver_end_in_one_line(server, tmp_path, odd):
    server.odd, began = {VAL: odd, "": odd}, time.monotonic()
    line = run(0, "--out_dir", tmp_path, "--retries", 0, "--timeout", 2, code=1)
    assert line.startswith(f"fineweb.py: {VAL}: ") and time.monotonic() - began < 10
    assert not (tmp_path / VAL).exists() and ("--timeout" in line) == ("trickle" in odd)


def test_a_full_disk_no_network_and_mistakes(server, tmp_path, monkeypatch):
    assert "File too large" in run(0, "--out_dir", tmp_path, code=1, preexec_fn=LIMIT) and len(server.asked) == 1
    run(0, "--out_dir", tmp_path)
    assert server.asked[1][1] and (tmp_path / VAL).read_bytes() == server.files[FOLDER + VAL]
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert ONE in run(1, "--out_dir", tmp_path, "--retries", 0, code=1)
    assert "103" in run(104, code=2) and VAL in run("--out_dir", tmp_path / VAL / "x", code=2)


def test_hellaswag_arrives_whole_or_not_at_all(server, tmp_path, monkeypatch):
    path, body = tmp_path / "x", os.urandom(300_000)
    for name, value in (("URL", f"{server.url}/x"), ("PATH", str(path)), ("SIZE", len(body))):
        monkeypatch.setattr(hellaswag, name, value)
    server.files["/x"] = body
    server.free.set()
    for odd in ({"cut": 100_000}, *HOSTILE[:5]):
        server.odd = {"x": odd, "": odd}
        with pytest.raises(SystemExit, match="^hellaswag.py: [^\n]+$"):
            hellaswag.main()
        assert os.listdir(tmp_path) == []
    server.odd = {}
    server.asked.clear()
    hellaswag.main()
    hellaswag.main()  # it is there: nobody is asked
    assert len(server.asked) == 1 and path.read_bytes() == body
    monkeypatch.setattr(hellaswag, "SIZE", 1)
    with pytest.raises(SystemExit, match="instead of 1$"):
        hellaswag.main()
    assert os.listdir(tmp_path) == ["x"]
