#!/usr/bin/env bash
# Keeps one rollout server running on this node: one that dies is started again at the same url, where a run finds it.
#
#   by hand:  export LONGRL_SERVER_KEY=...        # the trainer's, too: openssl rand -hex 32
#             CUDA_VISIBLE_DEVICES=0,1 SERVER=0 launch/server.sh --config configs/NAME.yaml --options '{"tensor_parallel_size": 2}' &
#             CUDA_VISIBLE_DEVICES=2,3 SERVER=1 launch/server.sh --config configs/NAME.yaml --options '{"tensor_parallel_size": 2}' &
#   SLURM:    launch/slurm_servers.sbatch starts it, once per server.
#
# SERVER    number of the server on this node; by default that of the task of a SLURM step, else 0
# PORT      of number 0 (8000); the others follow
# HOST      address to listen at: 0.0.0.0 by default, which takes LONGRL_SERVER_KEY; 127.0.0.1 is this machine alone
# RESTARTS  how many starts in a row may fail within MIN_UP_S seconds (60) before the script gives up (3)
#
# It ends with the server where that ended by itself (0) or cannot start as it was asked to (2), and with SIGTERM.
set -euo pipefail

SERVER=${SERVER:-${SLURM_LOCALID:-0}}
PORT=$((${PORT:-8000} + SERVER))
WHO="the server at port $PORT of $(hostname)"
CHILD=
IS_ENDING=

# SLURM's warning before a job's end goes to every step of it. It is meant for the trainer, which saves and is requeued.
trap '' USR1

end() {
  IS_ENDING=1
  [ -z "$CHILD" ] || kill -TERM "$CHILD" 2>/dev/null || true
}
trap end TERM INT

FAILURES=0
while [ -z "$IS_ENDING" ]; do
  STARTED=$SECONDS
  "${PYTHON:-python}" -m longrl serve --host "${HOST:-0.0.0.0}" --port "$PORT" "$@" &
  CHILD=$!
  [ -z "$IS_ENDING" ] || end
  STATUS=0
  wait "$CHILD" || STATUS=$?
  while kill -0 "$CHILD" 2>/dev/null; do # a signal ended the wait, not the server
    STATUS=0
    wait "$CHILD" || STATUS=$?
  done
  [ -z "$IS_ENDING" ] || break
  if [ "$STATUS" -eq 0 ] || [ "$STATUS" -eq 2 ]; then exit "$STATUS"; fi
  if [ $((SECONDS - STARTED)) -lt "${MIN_UP_S:-60}" ]; then FAILURES=$((FAILURES + 1)); else FAILURES=0; fi
  if [ "$FAILURES" -gt "${RESTARTS:-3}" ]; then
    echo "server.sh: $WHO has ended $FAILURES times in a row within ${MIN_UP_S:-60} s, now with status $STATUS" >&2
    exit "$STATUS"
  fi
  echo "server.sh: $WHO ended with status $STATUS and is started again" >&2
  sleep "${RESTART_AFTER_S:-5}"
done
