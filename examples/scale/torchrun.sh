#!/usr/bin/env bash
# Train on one machine or on several, started by hand with torchrun.
#
#   One machine:   examples/scale/torchrun.sh MODEL DATA [flags of veneer tune]
#   Two machines:  on each of them, with the first one's name:
#                  NODES=2 HEAD=first:29500 examples/scale/torchrun.sh MODEL DATA [flags]
#
# All machines see the same --out (NFS, Lustre and the like): one process writes it, and a run that is
# started again reads it. A process that dies ends the others; the agents start all again, up to
# RESTARTS times, and the run goes on from its newest checkpoint (--save-every).
set -euo pipefail

NODES=${NODES:-1}           # machines
PER_NODE=${PER_NODE:-auto}  # processes of each: auto is one for each GPU, without GPUs one for each core
HEAD=${HEAD:-127.0.0.1:29500}
RUN=${RUN:-veneer}          # the same on all machines; another run at the same time needs another
RESTARTS=${RESTARTS:-3}

exec torchrun \
  --nnodes "$NODES" \
  --nproc-per-node "$PER_NODE" \
  --rdzv-backend c10d \
  --rdzv-endpoint "$HEAD" \
  --rdzv-id "$RUN" \
  --max-restarts "$RESTARTS" \
  -m veneer tune "$@"
