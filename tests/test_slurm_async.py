"""launch/slurm_async.sbatch, slurm_servers.sbatch and server.sh beside stand-ins for SLURM's commands and longrl."""

import contextlib
import http.server
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "launch"
SRUN = """#!/usr/bin/env bash
# Every task of a step on this machine, each with its own log; SIGTERM goes to all.
echo "srun $*" >> "$FOLDER/srun.txt"
TASKS=1 LOG=
while [[ $1 == --* ]]; do
  case $1 in
    --ntasks=*) TASKS=${1#*=} ;;
    --output=*) LOG=${1#*=} ;;
  esac
  shift
done
trap 'kill -TERM $(jobs -p)' TERM
STARTED=()
for ((TASK = 0; TASK < TASKS; TASK++)); do
  FILE=${LOG//%t/$TASK}
  SLURM_LOCALID=$TASK "$@" >> "${FILE//%N/node}" 2>&1 &
  STARTED+=($!)
done
STATUS=0
for ONE in "${STARTED[@]}"; do
  wait "$ONE" || STATUS=$?
  while kill -0 "$ONE" 2> /dev/null; do wait "$ONE" || STATUS=$?; done
done
exit "$STATUS"
"""
SCONTROL = """#!/usr/bin/env bash
case "$1 $3" in
  "show servers") echo 127.0.0.1 ;;
  "show "*) echo node1; echo node2 ;;
  *) echo "scontrol $*" >> "$FOLDER/scontrol.txt" ;;
esac
"""
PYTHON = """#!{python} -S
import json, os, signal, sys
if sys.argv[1] == "-c":
    exec(sys.argv[2])
    raise SystemExit
folder, command = os.environ["FOLDER"], sys.argv[3]
servers = os.environ.get("SERVERS", "")
seen = {{"args": sys.argv[4:], "key": os.environ.get("LONGRL_SERVER_KEY"), "pid": os.getpid(),
        "mode": os.stat(servers).st_mode if os.path.exists(servers) else None}}
with open(f"{{folder}}/{{command}}.txt", "a") as file:
    file.write(json.dumps(seen) + "\\n")
codes = f"{{folder}}/{{command}}_codes"  # of this start, the next one and so on
left = open(codes).read().split() if os.path.exists(codes) else []
if left:
    open(codes, "w").write(" ".join(left[1:]))
    raise SystemExit(int(left[0]))
if command == "serve":
    import http.server
    class Health(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/health" else 404)
            self.end_headers()
        def log_message(self, *args):
            pass
    signal.signal(signal.SIGTERM, lambda *args: os._exit(0))
    port = int(sys.argv[sys.argv.index("--port") + 1])
    http.server.HTTPServer(("127.0.0.1", port), Health).serve_forever()
"""


def two_free_ports() -> int:
    """The first of two ports in a row that nobody has."""
    while True:
        with socket.socket() as first, socket.socket() as second, contextlib.suppress(OSError, OverflowError):
            first.bind(("127.0.0.1", 0))
            second.bind(("127.0.0.1", first.getsockname()[1] + 1))
            return first.getsockname()[1]


@pytest.fixture
def cluster(tmp_path):
    return Cluster(tmp_path)


class Cluster:
    """SLURM of two components on this machine: `node1` and `node2` train, 127.0.0.1 has two servers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = two_free_ports()
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("python", PYTHON.format(python=sys.executable))):
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        mine = {
            name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SRUN_", "LONGRL_"))
        }
        self.environment = mine | {
            "SLURM_JOB_ID": "77", "SLURM_HET_SIZE": "2", "SLURM_JOB_NODELIST": "trainers",
            "SLURM_JOB_NODELIST_HET_GROUP_0": "trainers", "SLURM_JOB_NODELIST_HET_GROUP_1": "servers",
            "SLURM_NTASKS_PER_NODE_HET_GROUP_0": "8", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS_PER_NODE": "8",
            "GPUS_PER_NODE": "8", "GPUS_PER_SERVER": "4", "PORT": str(self.port), "WEIGHTS_FOLDER": "/shared/weights",
            "LAUNCH": str(LAUNCH), "FOLDER": str(folder), "LOGS": str(folder / "logs"), "LOOK_EVERY_S": "0.05",
            "RESTART_AFTER_S": "0", "SERVERS": str(folder / "servers.env"), "WAIT_S": "60",
            "PATH": f"{folder}:{os.environ['PATH']}",
        }  # fmt: skip

    def start(self, script: str, *args: str, **variables: str) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", LAUNCH / script, *args], env=self.environment | variables, cwd=self.folder,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def run(self, script: str, *args: str, **variables: str) -> tuple[int, str]:
        """-> (exit code, what it wrote)"""
        process = self.start(script, *args, **variables)
        output, _ = process.communicate(timeout=60)
        return process.returncode, output

    def seen(self, name: str) -> list:
        """What the stand-in of a command noted, start by start."""
        file = self.folder / f"{name}.txt"
        lines = file.read_text().splitlines() if file.exists() else []
        return [json.loads(line) if line.startswith("{") else line for line in lines]

    def wait_for(self, condition) -> None:
        deadline = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def is_served(self, number: int) -> bool:
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", self.port + number)) == 0


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.02)


FIT = ("fit", "--config", "c.yaml", "--model.x", "y")


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (75, True), (1, False)])
def test_a_job_of_two_components_trains_with_its_servers_and_ends_them(cluster, status, requeued):
    (cluster.folder / "servers.env").write_text("of the job before it was requeued")
    (cluster.folder / "fit_codes").write_text(str(status))
    code, output = cluster.run("slurm_async.sbatch", *FIT)
    assert code == status, output
    assert cluster.seen("scontrol") == (["scontrol requeue 77"] if requeued else [])
    servers, (trainer,) = cluster.seen("serve"), cluster.seen("fit")
    for server in servers:  # the trainer's options, behind the server's own
        assert server["args"][4:8] == ["--config", "c.yaml", "--model.x", "y"]
        assert server["args"][8:] == ["--options", '{"tensor_parallel_size": 4}', "--weights_folder", "/shared/weights"]
    assert sorted(server["args"][3] for server in servers) == [str(cluster.port), str(cluster.port + 1)]
    urls = [f"http://127.0.0.1:{cluster.port + number}" for number in range(2)]
    given = trainer["args"]
    assert json.loads(given[given.index("--rollout.engine.urls") + 1]) == urls
    assert given[given.index("--rollout.engine.weights_folder") + 1] == "/shared/weights"
    assert given[given.index("--rollout.engine.transfer_host") + 1] == "node1"  # rank 0's
    assert given[-6:-2] == ["--trainer.num_nodes=2", "--trainer.devices=8", "--resume", "auto"]
    assert not (cluster.folder / "servers.env").exists()
    wait_until_gone([server["pid"] for server in servers])


def test_components_are_named_and_the_key_is_on_no_command_line(cluster):
    code, output = cluster.run("slurm_async.sbatch", *FIT)
    assert code == 0, output
    serving, training = cluster.seen("srun")
    assert serving.startswith(
        "srun --het-group=1 --kill-on-bad-exit=0 --wait=0 --nodes=1 --ntasks=2 --ntasks-per-node=2"
    )
    assert "--gpus-per-task=4 --cpus-per-task=48" in serving
    assert training.startswith("srun --het-group=0 --kill-on-bad-exit=1 ")
    (trainer,), servers = cluster.seen("fit"), cluster.seen("serve")
    (key,) = {trainer["key"], *(server["key"] for server in servers)}
    assert len(key) == 64
    assert key not in "".join([*cluster.seen("srun"), output, *map(str, [one["args"] for one in (trainer, *servers)])])
    assert stat.S_IMODE(trainer["mode"]) == 0o600
    logs = sorted(file.name for file in (cluster.folder / "logs").iterdir())
    assert logs == ["server-node-0.log", "server-node-1.log", "trainer-node-0.log"]


def test_a_trainer_that_is_requeued_comes_back_to_living_servers(cluster):
    """The two are jobs of their own; the trainer's may even start first."""
    (cluster.folder / "fit_codes").write_text("75 0")
    alone = {"SLURM_JOB_NODELIST": "servers", "WEIGHTS_FOLDER": ""}
    first = cluster.start("slurm.sbatch", *FIT)
    servers = cluster.start("slurm_servers.sbatch", *FIT[1:], **alone)
    first.communicate(timeout=60)
    code, _ = cluster.run("slurm.sbatch", *FIT)
    assert (first.returncode, code) == (75, 0)
    one, again = cluster.seen("fit")
    assert one["args"] == again["args"]
    assert one["key"] == again["key"]
    assert "--rollout.engine.weights_folder" not in one["args"]
    assert len(cluster.seen("serve")) == 2  # not started anew
    servers.send_signal(signal.SIGTERM)
    servers.communicate(timeout=60)
    assert servers.returncode == 143
    assert not (cluster.folder / "servers.env").exists()
    wait_until_gone([server["pid"] for server in cluster.seen("serve")])


def test_a_server_that_does_not_come_is_waited_for_no_longer_than_asked(cluster):
    with http.server.HTTPServer(("127.0.0.1", cluster.port), Healthy) as there, socket.socket() as taken:
        threading.Thread(target=there.serve_forever, daemon=True).start()
        taken.bind(("127.0.0.1", cluster.port + 1))  # so that the stand-in there dies, again and again
        code, output = cluster.run("slurm_async.sbatch", *FIT, WAIT_S="0", RESTARTS="1000", RESTART_AFTER_S="0.2")
        there.shutdown()
    assert code == 0, output
    assert f"http://127.0.0.1:{cluster.port + 1} does not answer" in output
    assert "1 of 2 servers" in output
    assert len(cluster.seen("fit")) == 1


class Healthy(http.server.BaseHTTPRequestHandler):
    """Answers as a server that is well."""

    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


def test_without_servers_no_trainer_is_started(cluster):
    (cluster.folder / "serve_codes").write_text("2 2")
    code, output = cluster.run("slurm_async.sbatch", *FIT)
    assert code == 1
    assert f"all servers have ended before http://127.0.0.1:{cluster.port} answered" in output
    assert cluster.seen("fit") == []


@pytest.mark.parametrize(("codes", "starts", "code"), [("1 137 2", 3, 2), ("1 1 1 1 1 1", 4, 1), ("0", 1, 0)])
def test_a_server_that_dies_is_started_again_at_its_port(cluster, codes, starts, code):
    (cluster.folder / "serve_codes").write_text(codes)
    ended, output = cluster.run("server.sh", "--config", "c.yaml", SERVER="1")
    assert ended == code
    assert [server["args"][3] for server in cluster.seen("serve")] == [str(cluster.port + 1)] * starts
    assert output.count("is started again") == starts - 1


def test_a_killed_server_comes_back_and_a_warning_before_the_end_of_a_job_is_not_for_it(cluster):
    script = cluster.start("server.sh", "--config", "c.yaml")
    cluster.wait_for(lambda: cluster.is_served(0))
    (server,) = cluster.seen("serve")
    for pid in (script.pid, server["pid"]):
        os.kill(pid, signal.SIGUSR1)
    os.kill(server["pid"], signal.SIGKILL)
    cluster.wait_for(lambda: len(cluster.seen("serve")) == 2 and cluster.is_served(0))
    script.send_signal(signal.SIGTERM)
    output, _ = script.communicate(timeout=60)
    assert script.returncode == 0
    assert "ended with status 137 and is started again" in output
    wait_until_gone([server["pid"] for server in cluster.seen("serve")])
