#!/usr/bin/env bash
# Train on several nodes under Slurm:  sbatch examples/cluster.sh run.toml runs/mine
#
# Five minutes before the time limit Slurm sends SIGUSR1, and the run saves and ends. To continue it automatically,
# submit the job several times: each starts when the previous one has ended, from the newest complete checkpoint.
#     for part in 1 2 3; do sbatch --dependency=singleton examples/cluster.sh run.toml runs/mine; done
#
#SBATCH --job-name=mm1
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

run=${1:?a .toml file or a named size}
out=${2:?a folder that all nodes share}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# With these options torchrun forwards SIGUSR1, and gives a save 600 seconds instead of 30.
srun torchrun \
    --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-8}" \
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$first:${PORT:-29500}" \
    --shutdown-timeout 600 --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    --no-python mm1 train "$run" --out "$out" --resume "${@:3}"
