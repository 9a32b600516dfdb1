"""runs/nodes.sh as a user runs it on two machines, of which one is lost; here they are two addresses of this one."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import numpy as np

NODES = pathlib.Path(__file__).resolve().parent.parent / "runs" / "nodes.sh"
# The meeting is at this machine's own address, if it has one: its host name may stand for 127.0.0.1, or 127.0.1.1.
HOST = (subprocess.run(["hostname", "-I"], capture_output=True, text=True).stdout.split() or ["127.0.0.2"])[0]
OTHER = "127.0.0.1"  # ranks go by address: this machine has rank 0, so it writes and reads
FLAGS = (
    "--device cpu --dtype float32 --tokenizer bytes --n_layer 1 --n_head 1 --n_embd 32 --block_size 32 --batch_size 4 "
    "--total_batch_size 256 --max_iters 20 --val_tokens 500 --val_loss_every 0 --save_every 1 --prompt a "
    "--sample_every 1 --max_new_tokens 60"  # a story after each step leaves time to kill one
).split()


def start(work, address, port):
    """A machine; what it says is added to ADDRESS.txt."""
    files = ["--train_files", work / "tokens.bin", "--val_files", work / "tokens.bin", "--out_dir", work / "out"]
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHON=sys.executable, GPUS="1", ADDRESS=address)
    environment["RDZV_CONF"] = "join_timeout=120,keep_alive_interval=1,keep_alive_max_attempt=5"
    with open(work / f"{address}.txt", "a") as said:
        command = ["bash", NODES, f"{HOST}:{port}", "2", *FLAGS, *files]
        return subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=environment)


def steps(work):
    """The steps that the log tells, one for each time that it was taken."""
    path = work / "out" / "log.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines(True) if line[-1] == "\n"] if path.exists() else []
    return [row["step"] for row in rows if "train_loss" in row]


def test_a_machine_is_lost_and_comes_back(tmp_path):
    header, tokens = np.zeros(256, "<i4"), np.random.default_rng(0).integers(32, size=4000)
    header[:3] = 20240520, 1, len(tokens)
    (tmp_path / "tokens.bin").write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())
    with socket.create_server((HOST, 0)) as free:
        port = free.getsockname()[1]
    host = start(tmp_path, HOST, port)
    while subprocess.run(["bash", "-c", f": < /dev/tcp/{HOST}/{port}"], stderr=subprocess.DEVNULL).returncode:
        time.sleep(0.2)
        assert host.poll() is None
    other = start(tmp_path, OTHER, port)
    while len(steps(tmp_path)) < 4:
        time.sleep(0.1)
        assert host.poll() is None and other.poll() is None
    children = pathlib.Path(f"/proc/{other.pid}/task/{other.pid}/children").read_text().split()
    subprocess.run(["kill", "-KILL", str(other.pid), *children], check=True)
    other.wait()
    assert max(steps(tmp_path)) < 18
    other = start(tmp_path, OTHER, port)
    assert (host.wait(120), other.wait(120)) == (0, 0), [path.read_text() for path in tmp_path.glob("*.txt")]
    log = (tmp_path / "out" / "log.txt").read_text()
    assert log.count("\nresumed from") == 1 and log.count(" parameters on 2 x cpu") == 2
    assert sorted(set(steps(tmp_path))) == list(range(1, 21))
