"""A deployed federation on this machine: a SuperLink and SuperNodes of Flower on the loopback, over TLS, for one run.

It makes certificates, starts the processes, runs the app of this repository on them, and ends each process by its id.
With --own-data each node has a file that no other process opens: shards of the run's data set, dealt here as a run
without nodes would deal them, or the files of --files.
"""

import argparse
import datetime
import ipaddress
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

ROOT = Path(__file__).resolve().parents[1]
HOST = "127.0.0.1"
STARTING, RUNNING = 90.0, 1800.0  # seconds


def certificates(folder: Path) -> dict[str, Path]:
    """A certificate authority's certificate, and the server's certificate and key that it vouches for, for a day."""
    keys = {name: ec.generate_private_key(ec.SECP256R1()) for name in ("ca", "server")}
    names = {name: x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"fl-attack demo {name}")]) for name in keys}
    now = datetime.datetime.now(datetime.UTC)
    files = {}
    for name, key in keys.items():
        draft = (
            x509.CertificateBuilder()
            .subject_name(names[name])
            .issuer_name(names["ca"])
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=5))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=name == "ca", path_length=None), critical=True)
        )
        if name == "server":
            places = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address(HOST))]
            draft = draft.add_extension(x509.SubjectAlternativeName(places), critical=False)
        files[name] = folder / f"{name}.pem"
        signed = draft.sign(keys["ca"], hashes.SHA256())
        files[name].write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    files["key"] = folder / "server.key"
    files["key"].touch(0o600)
    files["key"].write_bytes(
        keys["server"].private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return files


def dealt(folder: Path, overrides: list[str]) -> tuple[list[Path], set[int]]:
    """A file for each client with the samples that these settings deal to it, and which of them are malicious."""
    from fl_attack import scenario
    from fl_attack.config import compose

    cell = scenario.make(compose(*overrides, f"out={folder}/none"))
    files = [folder / f"client{client}.npz" for client in range(len(cell.schedule.shards))]
    for file, shard in zip(files, cell.schedule.shards, strict=True):
        x = np.asarray(cell.dataset.x_train[shard]).reshape(len(shard), *cell.dataset.shape)
        names = np.array(cell.dataset.classes)[cell.dataset.y_train[shard]]
        numbers = names.astype(int) if all(map(str.isdigit, cell.dataset.classes)) else cell.dataset.y_train[shard]
        np.savez(file, x_train=x, y_train=numbers)
    return files, set(cell.partition.malicious.tolist())


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens at."""
    with ExitStack() as held:
        probes = [held.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind((HOST, 0))
        return [probe.getsockname()[1] for probe in probes]


@contextmanager
def process(call: Sequence[object], log: Path, environ: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process with all that it starts, for the time of the block; what it says goes to a file."""
    with log.open("wb") as stream:
        words = [str(word) for word in call]
        started = subprocess.Popen(words, stdout=stream, stderr=stream, env=environ, start_new_session=True)
    try:
        yield started
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(started.pid, number)  # its own group: nobody else's process is in it
                started.wait(timeout=20)
            except ProcessLookupError:
                break
            except subprocess.TimeoutExpired:
                continue
        started.wait()


def wait_for(port: int, started: subprocess.Popen[bytes], log: Path) -> None:
    """Return once a process listens; SystemExit with the end of its log where it does not."""
    deadline = time.monotonic() + STARTING
    while time.monotonic() < deadline and started.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex((HOST, port)) == 0:
                return
        time.sleep(0.2)
    sys.exit(f"deploy_demo: a process did not start:\n{log.read_text()[-2000:]}")


def main() -> None:
    """Run the federation; exits 0 only where the run has left its results."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that nothing is left running
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, default=3, help="SuperNodes, each of them a client (3)")
    parser.add_argument("--plain", action="store_true", help="without TLS")
    parser.add_argument("--out", type=Path, default=Path("outputs/deployed"), help="folder of the results")
    parser.add_argument("--ids", default="", help="partition-id of each node, as in 0,1,2; none for a node without")
    parser.add_argument("--own-data", action="store_true", help="each node trains on a file of its own")
    parser.add_argument("--files", default="", help="the files of --own-data, as in a.npz,b.npz; by default dealt here")
    parser.add_argument("--malicious", default="", help="which of --files attack, counted from 0, as in 0,2")
    parser.add_argument("overrides", nargs="*", help="as for fl-attack")
    given = parser.parse_args()
    ids = given.ids.split(",") if given.ids else [str(node) for node in range(given.nodes)]
    if given.nodes < 1 or len(ids) != given.nodes:
        parser.error(f"--nodes {given.nodes} with --ids {given.ids}: give at least a node, and an id for each")
    if given.files and (not given.own_data or len(given.files.split(",")) != given.nodes):
        parser.error(f"--nodes {given.nodes} with --files {given.files}: give --own-data, and a file for each node")
    out = given.out.absolute()
    if (out / "summary.json").exists():
        parser.error(f"--out {given.out} holds a finished run; use another folder")
    with tempfile.TemporaryDirectory(prefix="fl-attack-demo-") as scratch, ExitStack() as held:
        place = Path(scratch)
        bin_ = Path(sys.executable).parent
        environ = os.environ | {
            "FLWR_HOME": f"{place}/flwr",
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "PATH": f"{bin_}{os.pathsep}{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",  # seconds; else a message waits up to one for its process
        }
        files = {} if given.plain else certificates(place)
        overrides = [f"clients.total={given.nodes}", *given.overrides]
        settings: list[str] = [f"partition-id={number}" for number in ids]
        if given.own_data:
            names, attack = [Path(name).absolute() for name in given.files.split(",")], given.malicious.split(",")
            attackers = {int(node) for node in attack if node}
            if not given.files:
                names, attackers = dealt(place, overrides)
            settings = [f"data-path={json.dumps(str(name))}" for name in names]
            for node in attackers:
                settings[node] += " malicious=true"
            if given.ids:
                settings = [f"{one} partition-id={number}" for one, number in zip(settings, ids, strict=True)]
            overrides = [one for one in overrides if not one.startswith("partition")] + ["partition=own"]
        settings = [one.replace("partition-id=none", "") for one in settings]
        port, *node_ports = free_ports(given.nodes + 1)
        link = ["--host", HOST, "--port", port, "--disable-runtime-dependency-installation"]
        secure = (
            ["--ssl-ca-certfile", files["ca"], "--ssl-certfile", files["server"], "--ssl-keyfile", files["key"]]
            if files
            else ["--insecure"]
        )
        log = place / "superlink.log"
        wait_for(port, held.enter_context(process([bin_ / "flower-superlink", *link, *secure], log, environ)), log)
        trust = ["--root-certificates", files["ca"]] if files else ["--insecure"]
        for node, (node_port, config) in enumerate(zip(node_ports, settings, strict=True)):
            call = [bin_ / "flower-supernode", "--superlink", f"{HOST}:{port}", "--port", node_port, *trust]
            wanted = ["--node-config", config] if config.strip() else []
            held.enter_context(process([*call, *wanted], place / f"node{node}.log", environ))
        print(
            f"SuperLink at {HOST}:{port} with {given.nodes} SuperNodes, {'plain' if given.plain else 'TLS'}", flush=True
        )

        (place / "flwr").mkdir(exist_ok=True)
        how = f"root-certificates = {json.dumps(str(files['ca']))}" if files else "insecure = true"
        (place / "flwr" / "config.toml").write_text(
            f'[superlink]\ndefault = "demo"\n\n[superlink.demo]\naddress = "{HOST}:{port}"\n{how}\n'
        )
        config = f"out={json.dumps(str(out))} overrides={json.dumps(' '.join(overrides))}"
        app = place / "app"
        shutil.copytree(ROOT / "fl_attack", app / "fl_attack", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(ROOT / "conf", app / "conf")
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, app / name)
        call = [str(bin_ / "flwr"), "run", str(app), "demo", "--stream", "--run-config", config]
        with process(call, place / "run.log", environ) as running:
            deadline = time.monotonic() + RUNNING
            while running.poll() is None and not (out / "summary.json").exists() and time.monotonic() < deadline:
                if "fl-attack: " in (place / "run.log").read_text():
                    break
                time.sleep(0.3)
            if running.poll() is None:  # the last lines are still to come
                time.sleep(3)
        said = (place / "run.log").read_text()
        if not (out / "summary.json").exists():
            told = [line[line.index("fl-attack: ") :] for line in said.splitlines() if "fl-attack: " in line]
            if told:
                sys.exit(told[-1])
            nodes = "".join(file.read_text()[-1500:] for file in sorted(place.glob("*.log")))
            sys.exit(f"deploy_demo: the run left no results:\n{said[-3000:]}\n{nodes}")
        summary = json.loads((out / "summary.json").read_text())
        print(f"final accuracy {summary['final_accuracy']:.4f}, {summary['flips']} flips, {summary['seconds']:.1f} s")
        print(f"results in {given.out}")


if __name__ == "__main__":
    main()
