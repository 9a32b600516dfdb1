"""runs/nodes.sh as a user runs it on two machines, of which one is lost; here they are two addresses of this one."""

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
from test_train_gpt import ENVIRONMENT, ROOT, SLOW, TINY, assert_same_end, step_of, train, wait_for, worker, write_shard

HOST, OTHER = "127.0.0.2", "127.0.0.1"  # ranks go by address: the other machine has rank 0, so it writes and reads
QUICK = "join_timeout=120,keep_alive_interval=1,keep_alive_max_attempt=5"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """The folder that the machines share: shards, and a run on one machine to compare with. At the end none is left."""
    work = tmp_path_factory.mktemp("nodes")
    tokens = np.random.default_rng(0).integers(257, size=8000)
    write_shard(work / "train_0.bin", tokens[:7000] // 8)
    write_shard(work / "val_0.bin", tokens[7000:] // 8)
    train(work, "reference", ranks=2)
    yield work
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(work).encode() in (folder / "cmdline").read_bytes():
                os.kill(int(folder.name), signal.SIGKILL)


def free_port():
    with socket.socket() as s:
        s.bind((HOST, 0))
        return s.getsockname()[1]


def start(work, out, address, port, *flags):
    """A machine; what it says is added to OUT_ADDRESS.txt."""
    files = "--train_files", work / "train_*.bin", "--val_files", work / "val_*.bin", "--out_dir", work / out
    command = ["bash", ROOT / "runs" / "nodes.sh", f"{HOST}:{port}", 2, *TINY, *files, *flags]
    environment = {**ENVIRONMENT, "PYTHON": sys.executable, "GPUS": "1", "ADDRESS": address, "RDZV_CONF": QUICK}
    with open(work / f"{out}_{address}.txt", "a") as said:
        return subprocess.Popen(list(map(str, command)), stdout=said, stderr=subprocess.STDOUT, env=environment)


def start_both(work, out, *flags):
    """The machine that hosts the meeting, then, when it can be reached, the other one."""
    port = free_port()
    host = start(work, out, HOST, port, *flags)

    def reached():
        with socket.socket() as s:
            return s.connect_ex((HOST, port)) == 0

    wait_for(reached, host)
    return host, start(work, out, OTHER, port, *flags), port


def lose(work, out, machine, rank):
    """Kill a machine's torchrun and its process at once, in the middle of the run."""
    wait_for(lambda: step_of(work / out) > 2, machine)
    process = worker(str(work / out), rank)
    machine.kill()
    os.kill(process, signal.SIGKILL)
    machine.wait()
    assert step_of(work / out) < 18


def said(work, out):
    return "".join(f"{path.name}:\n{path.read_text()}\n" for path in work.glob(f"{out}_*.txt"))


def test_two_machines_learn_what_two_processes_of_one_do(work):
    host, other, _ = start_both(work, "two")
    assert (host.wait(120), other.wait(120)) == (0, 0), said(work, "two")
    assert_same_end(work / "two", work / "reference")


def test_a_machine_is_lost_and_comes_back(work):
    flags = *SLOW, "--save_every", 1
    host, other, port = start_both(work, "lost", *flags)
    lose(work, "lost", other, rank=0)
    other = start(work, "lost", OTHER, port, *flags)
    assert (host.wait(120), other.wait(120)) == (0, 0), said(work, "lost")
    assert "resumed from" in said(work, "lost")
    assert_same_end(work / "lost", work / "reference")


def test_without_the_machine_where_all_meet_the_others_end_and_the_same_lines_go_on(work):
    flags = *SLOW, "--save_every", 1
    host, other, _ = start_both(work, "alone", *flags)
    lose(work, "alone", host, rank=1)
    assert other.wait(120) > 0, said(work, "alone")
    host, other, _ = start_both(work, "alone", *flags)
    assert (host.wait(120), other.wait(120)) == (0, 0), said(work, "alone")
    assert "resumed from" in said(work, "alone")
    assert_same_end(work / "alone", work / "reference")


@pytest.mark.parametrize("arguments", [[], ["gpu-1:29500"], ["gpu-1", "2"], ["gpu-1:29500", "two"], ["gpu-1:1", "0"]])
def test_a_mistake_gets_the_usage(arguments):
    found = subprocess.run(["bash", ROOT / "runs" / "nodes.sh", *arguments], capture_output=True, text=True)
    assert found.returncode == 2 and not found.stdout
    assert found.stderr.count("\n") == 1 and "HOST:PORT NODES" in found.stderr
