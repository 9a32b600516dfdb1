#!/usr/bin/env bash
# train_gpt.py on several machines: the same line on each of them, in any order, in a copy of this repository.
#
#     bash runs/nodes.sh HOST:PORT NODES [flags of train_gpt.py]
#     bash runs/nodes.sh gpu-1:29500 2 --hellaswag_every 1000 --out_dir shared/gpt
#
# HOST is one of the NODES machines, by a name or address that all of them know, and PORT is free there: at that place
# they meet. From the environment, each machine for itself:
#     GPUS       how many processes here; not given: one for each GPU, or one without any
#     ADDRESS    this machine, as the others reach it; not given: its host name, which then they must be able to look up
#     RDZV_CONF  instead of what is set below
#
# What all need: the same commit, PyTorch and shards, and, between the machines, all ports open: beside PORT the
# processes take free ones. --out_dir must be a folder that all machines share. Rank 0 alone writes checkpoints and
# logs; with --resume rank 0 alone reads, and sends weights and optimizer to the others. But which machine holds
# rank 0 is decided anew when one comes back, and it must find what the one before has saved. data/ can be shared or be
# on each machine; so can the questions of HellaSwag, which data/hellaswag.py downloads.
#
# A machine is lost: processes on the others notice that it is gone, end, and wait for another one. Give the same line
# on that machine, or on a new one, and all go on from the last checkpoint: what --save_every (steps) lets them lose.
# A machine that vanishes without closing its connections is noticed by NCCL after 10 minutes, or as soon as it is back.
# HOST is lost: it keeps the list of who is there, so the others end with an error. Give the line everywhere again.
# To stop the run, press Ctrl-C on every machine: it saves first.
#
# When they cannot reach each other, or slowly: a machine often has several networks, and the libraries may pick the
# wrong one. `ip addr` lists them; NCCL_SOCKET_IFNAME=eth0 names the one for NCCL (GPUs), GLOO_SOCKET_IFNAME=eth0 for
# gloo (CPUs), and NCCL_DEBUG=INFO shows whether InfiniBand (NET/IB) or plain sockets (NET/Socket) are in use.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() { echo "runs/nodes.sh: $1; usage: bash runs/nodes.sh HOST:PORT NODES [flags of train_gpt.py]" >&2; exit 2; }
[ $# -ge 2 ] || usage "HOST:PORT and NODES are needed"
[[ $1 =~ ^.+:[0-9]+$ ]] || usage "'$1' is not HOST:PORT"
[[ $2 =~ ^[1-9][0-9]*$ ]] || usage "'$2' is not a number of machines"
meet=$1 nodes=$2
shift 2
gpus=${GPUS:-$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)}
[[ $gpus =~ ^(0|[1-9][0-9]*)$ ]] || usage "GPUS='$gpus' is not a number of processes"
python=${PYTHON:-$(command -v .venv/bin/python || echo python3)}

# torchrun compares HOST with what this machine's host name stands for, which on Debian is 127.0.1.1, not its address.
for address in $(getent ahosts "${meet%:*}" 2>/dev/null | cut -d " " -f 1); do
    if [[ " $(hostname -I 2>/dev/null) " == *" $address "* ]]; then meet=localhost:${meet##*:}; fi
done

# Without this, torchrun keeps one store for all attempts, and a machine that comes back reads addresses of dead ones.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

flags=(
    --nnodes="$nodes" --nproc_per_node="$((gpus > 0 ? gpus : 1))"
    --rdzv_backend=c10d --rdzv_endpoint="$meet"  # nothing else to install: a store in the torchrun of HOST
    --rdzv_id=train_gpt                          # who says the same name belongs together: one run for each HOST:PORT
    --max-restarts=3                             # of the processes here, after a failure; who only has to start anew
                                                 # because a machine has joined uses none up
    # Seconds: how long to wait for a lost machine to be replaced (torchrun's own choice is 600), and how often one says
    # that it is there and how often in a row that may fail: its place is free after 5 x 3.
    --rdzv_conf="${RDZV_CONF:-join_timeout=3600,keep_alive_interval=5,keep_alive_max_attempt=3}"
)
[ -z "${ADDRESS:-}" ] || flags+=(--local_addr="$ADDRESS")

# --resume: started again, each attempt goes on from the checkpoint; without one it begins.
exec "$python" -m torch.distributed.run "${flags[@]}" train_gpt.py --resume "$@"
