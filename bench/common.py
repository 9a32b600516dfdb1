"""What several benches share."""

# The model of runs/demo.sh, a small one of bytes for a CPU, and its learning rates; no stories are written on the way.
DEMO = (
    "--tokenizer bytes --n_layer 4 --n_head 4 --n_embd 256 --block_size 256 --total_batch_size 4096 --batch_size 16 "
    "--matrix_lr 0.03 --embed_lr 0.3 --head_lr 0.01 --weight_decay 0 --device cpu --sample_every 0 --overwrite"
).split()
