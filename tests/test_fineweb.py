"""data/fineweb.py against a server that supports ranges or not, cuts connections, and serves what it should not."""

import contextlib
import http.server
import os
import pathlib
import pty
import re
import resource
import signal
import subprocess
import sys
import threading
import time
import types

import numpy as np
import pytest

import data.fineweb as script

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDER = "/mirror/datasets/kjj0/fineweb10B-gpt2/resolve/main/"
VAL, ONE, TWO = "fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin"


def shard(seed, tokens=150_000):
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, tokens
    return header.tobytes() + np.random.default_rng(seed).integers(50257, size=tokens).astype("<u2").tobytes()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server, name = self.server, self.path.removeprefix(FOLDER)
        asked = self.headers["Range"]
        server.asked.append((name, asked))
        if server.barrier:
            server.barrier.wait(10)
        if server.statuses:
            return self.answer(server.statuses.pop(0), b"sorry")
        if name not in server.files:
            return self.answer(404, b"no such file")
        data, start = server.files[name], 0
        if asked and server.ranges:
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
            if start >= len(data):
                return self.answer(416, b"", {"Content-Range": f"bytes */{len(data)}"} if server.names_the_size else {})
        headers = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        self.answer(206 if start else 200, data[start:], headers, server.cuts.pop(0) if server.cuts else None)

    def answer(self, status, body, headers={}, cut=None):  # noqa: B006
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body[:cut])
        if cut is not None:
            self.server.free.wait(60)  # either cut off now, or left hanging
            self.close_connection = True

    def log_message(self, *arguments):
        pass


class Server(http.server.ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        pass  # a client that was killed


@pytest.fixture
def server(monkeypatch):
    server = Server(("127.0.0.1", 0), Handler)
    server.files = {VAL: shard(0), ONE: shard(1), TWO: shard(2, tokens=1000)}
    server.ranges, server.names_the_size, server.barrier = True, True, None
    server.asked, server.statuses, server.cuts, server.free = [], [], [], threading.Event()
    server.free.set()
    server.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_ENDPOINT", server.url + "/mirror/")
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.free.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def waits(monkeypatch):
    """How long the script would have slept."""
    waits = []
    monkeypatch.setattr(script, "time", types.SimpleNamespace(sleep=waits.append, perf_counter=time.perf_counter))
    return waits


def run(*arguments, code=0, **settings):
    command = [sys.executable, str(ROOT / "data" / "fineweb.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, **settings)
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    return done


def last_line(*arguments, code, **settings):
    line = run(*arguments, code=code, **settings).stderr.splitlines()[-1]
    assert line.startswith("fineweb.py: "), line
    return line


def get(server, path, name=ONE, **settings):
    script.download(server.url + FOLDER + name, str(path), script.check_shard, **settings)
    assert path.read_bytes() == server.files[name] and not pathlib.Path(f"{path}.part").exists()


def refused(server, path, name=ONE, **settings):
    with pytest.raises(OSError) as error:
        script.download(server.url + FOLDER + name, str(path), script.check_shard, **settings)
    assert not path.exists() and "\n" not in str(error.value) and path.name in str(error.value)
    return str(error.value)


def test_shards_arrive_and_are_then_passed_over(server, tmp_path):
    done = run(2, "--out_dir", tmp_path / "new" / "folder", "--concurrency", 2)
    assert {p.name: p.read_bytes() for p in (tmp_path / "new" / "folder").iterdir()} == server.files
    assert "\r" not in done.stderr and re.search("3 of 3 files  0.6 of 0.6 MB .* MB/s", done.stderr.splitlines()[-1])
    assert "3 shards" in done.stdout and sorted(name for name, _ in server.asked) == sorted(server.files)
    server.asked.clear()
    (tmp_path / "new" / "folder" / TWO).write_bytes(server.files[TWO][:-2])  # not whole: fetched again
    run(2, "--out_dir", tmp_path / "new" / "folder")
    assert server.asked == [(TWO, None)]
    assert (tmp_path / "new" / "folder" / TWO).read_bytes() == server.files[TWO]


def test_as_many_at_a_time_as_were_asked_for(server, tmp_path):
    server.barrier = threading.Barrier(3)  # lets none pass before three have come
    run(2, "--out_dir", tmp_path, "--concurrency", 3)
    server.barrier, server.asked[:] = None, []
    server.free.clear()
    server.cuts[:] = [1, 1, 1]  # all that begin are left hanging
    for name in server.files:
        (tmp_path / name).unlink()
    command = [sys.executable, ROOT / "data" / "fineweb.py", "2", "--out_dir", tmp_path, "--concurrency", "2"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        wait_until(lambda: len(server.asked) == 2)
        time.sleep(0.3)
        process.kill()
    assert len(server.asked) == 2


def test_a_cut_connection_is_resumed(server, tmp_path, waits):
    server.cuts[:] = [150_000, 0, 80_000]
    get(server, tmp_path / "x.bin")
    assert server.asked.pop(0) == (ONE, None)
    a, b, c = (int(asked[6:-1]) for _, asked in server.asked)
    assert 80_000 < a <= 150_000 and a == b < c <= b + 80_000
    assert waits == [1, 2, 1], "bytes that arrive end a row of failures"


def test_a_server_that_ignores_ranges_sends_all_again(server, tmp_path, waits):
    server.ranges, server.cuts[:] = False, [200_000]
    get(server, tmp_path / "x.bin")
    assert len(server.asked) == 2 and server.asked[1][1].startswith("bytes=")
    server.cuts[:] = [200_000] * 9  # and one that always stops at the same place is given up
    assert "connection was lost" in refused(server, tmp_path / "y.bin", retries=3)
    assert len(server.cuts) == 5 and waits[1:] == [1, 2, 4]
    assert 0 < (tmp_path / "y.bin.part").stat().st_size <= 200_000


def test_a_part_that_is_whole_or_too_long(server, tmp_path, waits):
    path, part = tmp_path / "x.bin", tmp_path / "x.bin.part"
    part.write_bytes(server.files[ONE])
    get(server, path)
    assert server.asked == [(ONE, f"bytes={len(server.files[ONE])}-")]
    path.unlink()
    part.write_bytes(server.files[ONE] + b"more")
    get(server, path)
    path.unlink()
    server.names_the_size = False  # then nobody knows whether the part is whole
    part.write_bytes(server.files[ONE])
    get(server, path)
    assert [asked for _, asked in server.asked[1:]] == ["bytes=301028-", None, "bytes=301024-", None] and waits == []


def test_a_server_in_trouble_is_asked_again_and_a_missing_file_is_not(server, tmp_path, waits):
    server.statuses[:] = [500, 429]
    get(server, tmp_path / "x.bin")
    assert waits == [1, 2]
    server.statuses[:] = [503] * 9
    assert "503" in refused(server, tmp_path / "y.bin", retries=2) and len(server.statuses) == 6
    server.statuses.clear()
    server.asked.clear()
    assert "404" in refused(server, tmp_path / "z.bin", name="other.bin") and len(server.asked) == 1


def test_what_is_no_whole_shard_gets_no_final_name(server, tmp_path):
    good = server.files[ONE]
    for wrong, message in (
        (b"<html>Please log in</html>" * 99, "20240520"),
        (good[:4] + b"\2" + good[5:], "[20240520, 2]"),
        (good[:-2], "301,022 bytes, but 301,024"),
        (good + b"\0\0", "301,026 bytes"),
        (b"", "20240520"),
        (good[:1000], "20240520"),
    ):
        server.files[ONE] = wrong
        assert message in refused(server, tmp_path / "x.bin")
        assert list(tmp_path.iterdir()) == [], "a part that is wrong would never become right"
    line = last_line(1, "--out_dir", tmp_path, code=1)
    assert ONE in line and "20240520" in line and not (tmp_path / ONE).exists()


def wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)


def on_a_terminal(*arguments):
    ours, theirs = pty.openpty()
    command = [sys.executable, ROOT / "data" / "fineweb.py", *arguments]
    process = subprocess.Popen(command, stderr=theirs, stdout=subprocess.DEVNULL)
    os.close(theirs)
    return process, ours


def everything(terminal):
    """What was shown until the other end was closed."""
    shown = b""
    with contextlib.suppress(OSError):  # which is how Linux says so
        while piece := os.read(terminal, 1000):
            shown += piece
    return shown.decode().replace("\r\n", "\n")


@pytest.mark.parametrize("name, code", [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_after_a_kill_or_ctrl_c_the_same_command_goes_on(server, tmp_path, name, code):
    server.free.clear()
    server.cuts[:] = [200_000]  # which then hangs
    part = tmp_path / f"{VAL}.part"
    process, terminal = on_a_terminal("0", "--out_dir", tmp_path)
    wait_until(lambda: part.exists() and part.stat().st_size > 100_000)
    process.send_signal(name)
    assert process.wait(5) == code and not (tmp_path / VAL).exists()
    progress, *said = everything(terminal).removesuffix("\n").split("\n")
    assert progress.startswith("\r0 of 1 files")
    if name == signal.SIGINT:
        assert said == ["fineweb.py: interrupted; the same command goes on with what has arrived"]
    have = part.stat().st_size
    assert 100_000 < have <= 200_000
    run(0, "--out_dir", tmp_path)
    assert server.asked == [(VAL, None), (VAL, f"bytes={have}-")]
    assert (tmp_path / VAL).read_bytes() == server.files[VAL]


def test_no_network(tmp_path, monkeypatch, waits):
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as closed:
        url = f"http://127.0.0.1:{closed.server_port}"
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_ENDPOINT", url)
    assert "cannot reach 127.0.0.1" in last_line("--out_dir", tmp_path, "--retries", 0, code=1)
    with pytest.raises(OSError, match="network"):
        script.download(url, str(tmp_path / "x"))
    assert waits == [1, 2, 4, 8, 16]
    monkeypatch.setenv("HF_ENDPOINT", "nonsense")
    assert "nonsense" in last_line("--out_dir", tmp_path, code=1)


def test_a_full_disk_ends_it_and_keeps_what_arrived(server, tmp_path):
    """A limit on the size of files stands in for the full disk: it fails at the same place."""

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))

    assert f"{VAL}: File too large" in last_line(0, "--out_dir", tmp_path, code=1, preexec_fn=limit)
    assert len(server.asked) == 1 and os.listdir(tmp_path) == [f"{VAL}.part"]
    run(0, "--out_dir", tmp_path)
    assert (tmp_path / VAL).read_bytes() == server.files[VAL]


def test_mistakes_get_one_line(server, tmp_path):
    (tmp_path / "file").write_text("")
    for arguments, message in (
        ((104,), "from 0 to 103"),
        ((-1,), "-1"),
        (("ten",), "'ten'"),
        ((1, "--concurrency", 0), "--concurrency"),
        ((1, "--out_dir", tmp_path / "file" / "x"), "--out_dir"),
        ((1, "--out_dir", tmp_path / "file"), "--out_dir"),
        ((1, "--out_dir", "/proc"), "--out_dir"),  # where not even root can write
    ):
        done = run(*arguments, code=2)
        assert done.stderr.count("\n") == 1 and message in done.stderr, done.stderr
    assert server.asked == []
    assert "(default: 9)" in run("--help").stdout


def test_a_terminal_gets_one_line_that_is_written_over(server, tmp_path):
    process, terminal = on_a_terminal("2", "--out_dir", tmp_path)
    shown = everything(terminal)
    assert process.wait() == 0 and shown.count("\n") == 1 and "\r3 of 3 files" in shown and "ETA" in shown, shown


def test_progress_adds_up_the_files(capsys):
    progress = script.Progress(files=4)
    progress.start -= 10  # ten seconds ago
    progress("a", 3_000_000, 5_000_000, fresh=1_000_000)
    progress.next = 0
    progress("b", 5_000_000, 5_000_000, whole=True)
    progress.live, progress.next = True, 0
    progress("b", 5_000_000, 5_000_000)
    progress.stop()
    assert progress.lock.locked(), "nothing more is shown"
    first, second, third, end = capsys.readouterr().err.split("\n")
    assert first.split("  ")[:3] == ["0 of 4 files", "3.0 of 20.0 MB", "0.1 MB/s"]
    assert second.split("  ")[:4] == ["1 of 4 files", "8.0 of 20.0 MB", "0.1 MB/s", "ETA 120 s"]
    assert third.startswith("\r1 of 4 files") and end == ""
