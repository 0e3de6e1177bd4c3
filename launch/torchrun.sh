#!/usr/bin/env bash
# Starts a run on this node with torchrun; run it once on every node.
#
#   one node:    launch/torchrun.sh fit --config configs/NAME.yaml
#   two nodes:   NNODES=2 NODE_RANK=0 MASTER_ADDR=ADDRESS_OF_NODE_0 launch/torchrun.sh fit --config configs/NAME.yaml
#                NNODES=2 NODE_RANK=1 MASTER_ADDR=ADDRESS_OF_NODE_0 launch/torchrun.sh fit --config configs/NAME.yaml
#
# DEVICES   processes per node, one per GPU; by default all GPUs of the node.
set -euo pipefail

NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}
MASTER_PORT=${MASTER_PORT:-29500}
DEVICES=${DEVICES:-$(nvidia-smi --list-gpus | wc -l)}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

exec "${PYTHON:-python}" -m torch.distributed.run \
  --nnodes="$NNODES" --node-rank="$NODE_RANK" --nproc-per-node="$DEVICES" \
  --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" \
  -m longrl "$@" --trainer.num_nodes="$NNODES" --trainer.devices="$DEVICES"
