#!/usr/bin/python3
"""How long a guest waits when a node dies, freezes or hands its volume over.

Six real processes (`xsan dev --processes`), rs(4,2), a volume full of random 4k data. A client writes 4 KiB at a time, one after the
other, and never stops; something happens to a node; the longest time between two answers is the pause. Kinds take turns,
so that what else happens on the machine hits all alike. See README.md here.
Needs only the standard library, fio with the nbd engine, and a release build of xsan.
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

GIB = 1 << 30
BLOCK = 4096
VOLUME = "failover"
WHOLE_WITHIN = 180.0

# kind: (what happens, goal in milliseconds)
KINDS = {
    "storage-killed": ("kill -9 of a journal member's node that leads nothing", 500),
    "storage-frozen": ("the same node stopped by SIGSTOP for 6 s", 1500),
    "leader-killed": ("kill -9 of a journal member's node that leads the metadata", 3500),
    "leader-frozen": ("the same node stopped by SIGSTOP for 6 s", 3500),
    "gateway-killed": ("kill -9 of the serving node; the client goes to another", 5000),
    "hand-over": ("`volume attach` at another node; the client follows", 300),
}
FREEZE_SECONDS = 6.0


def say(text):
    print(text, file=sys.stderr, flush=True)


def wait_for(condition, what, limit):
    end = time.monotonic() + limit
    while not condition():
        if time.monotonic() > end:
            raise RuntimeError(f"not within {limit:.0f} s: {what}")
        time.sleep(0.05)


class Connection:
    """One NBD connection: fixed newstyle, NBD_OPT_GO, simple replies (docs of the protocol: NetworkBlockDevice/nbd)."""

    def __init__(self, path, timeout):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(timeout)
        self.socket.connect(str(path))
        magic, option, _flags = struct.unpack(">8s8sH", self.take(18))
        if (magic, option) != (b"NBDMAGIC", b"IHAVEOPT"):
            raise OSError("not an NBD server")
        name = VOLUME.encode()
        data = struct.pack(">I", len(name)) + name + struct.pack(">H", 0)
        self.socket.sendall(struct.pack(">I", 3) + b"IHAVEOPT" + struct.pack(">II", 7, len(data)) + data)
        while True:
            _magic, _option, kind, length = struct.unpack(">QIII", self.take(20))
            text = self.take(length)
            if kind == 1:
                break
            if kind & 1 << 31:
                raise OSError(f"refused: {text.decode(errors='replace')}")
        self.handle = 0

    def take(self, length):
        parts = b""
        while len(parts) < length:
            part = self.socket.recv(length - len(parts))
            if not part:
                raise OSError("the connection ended")
            parts += part
        return parts

    def write(self, offset, data):
        self.handle += 1
        self.socket.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 1, self.handle, offset, len(data)) + data)
        magic, error, handle = struct.unpack(">IIQ", self.take(16))
        if (magic, handle) != (0x67446698, self.handle):
            raise OSError("an answer to something else")
        if error:
            raise OSError(error, "the write failed")

    def close(self):
        self.socket.close()


class Writer(threading.Thread):
    """A guest: one write after the other, repeated elsewhere if a connection ends. Never gives up."""

    def __init__(self, cluster, size):
        super().__init__(daemon=True)
        self.cluster, self.blocks = cluster, size // BLOCK
        self.data = os.urandom(BLOCK)
        self.begun = self.answered = time.monotonic()
        self.longest = 0.0
        self.writes = 0
        self.stopped = False
        self.lock = threading.Lock()

    def run(self):
        connection = None
        while not self.stopped:
            offset = random.randrange(self.blocks) * BLOCK
            while not self.stopped:
                try:
                    if connection is None:
                        connection = self.connect()
                    connection.write(offset, self.data)
                    break
                except OSError:
                    if connection is not None:
                        connection.close()
                    connection = None
                    time.sleep(0.01)
            with self.lock:
                now = time.monotonic()
                self.longest = max(self.longest, now - self.answered)
                self.answered = now
                self.writes += 1

    def connect(self):
        """At the node that served last, else at any that lets us in."""
        refusal = OSError("no node")
        for node in [self.cluster.serving, *self.cluster.nodes]:
            if node in self.cluster.dead:
                continue
            try:
                connection = Connection(self.cluster.dir / node / "nbd.sock", 30)
                self.cluster.serving = node
                return connection
            except OSError as error:
                refusal = error
        raise refusal

    def forget(self):
        """The next pause counts from here."""
        with self.lock:
            self.longest, self.writes = 0.0, 0

    def pause(self):
        """The longest pause since `forget`; the one that lasts included."""
        with self.lock:
            return max(self.longest, time.monotonic() - self.answered), self.writes


class Cluster:
    """Processes on this machine, started again by us when we ended them."""

    def __init__(self, program, scratch, device_gib):
        self.program, self.dir = program, scratch / "cluster"
        self.log = open(scratch / "failover.log", "w", encoding="utf-8")
        self.server = subprocess.Popen([program, "dev", "--processes", "--dir", str(self.dir), "--device-size", f"{device_gib}GiB"],
                                       stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log)
        self.nodes = [f"n{number}" for number in range(1, 7)]
        self.serving = "n1"
        self.dead = set()
        self.restarted = {}
        wait_for(self.is_up, "the cluster is up", 60)

    def xsan(self, node, *words):
        done = subprocess.run([str(self.program), "--admin", str(self.dir / node / "admin.sock"), *words], capture_output=True,
                              text=True, stdin=subprocess.DEVNULL, timeout=120, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"xsan {' '.join(words)} at {node}: {done.stderr.strip()}")
        return done.stdout

    def is_up(self):
        if self.server.poll() is not None:
            raise RuntimeError("xsan dev ended")
        try:
            status = self.status()
            return len(status["nodes"]) == len(self.nodes) and all(node["answers"] for node in status["nodes"]) and status["pools"]
        except (RuntimeError, ValueError):
            return False

    def status(self):
        node = next(node for node in self.nodes if node not in self.dead)
        return json.loads(self.xsan(node, "status", "--output", "json"))

    def is_whole(self):
        """Nothing is missing anywhere, so that the next fault is the only one."""
        try:
            status = self.status()
        except RuntimeError:
            return False
        volume = status["volumes"][0]
        engine = volume["engine"]
        return (status["health"] == "ok" and engine is not None and volume["node"] == self.serving
                and engine["members"] == engine["members_wanted"] and engine["segments_with_holes"] == 0
                and not engine["unchecked"])

    def pid(self, node):
        return int((self.dir / node / "pid").read_text())

    def kill(self, node):
        self.dead.add(node)
        os.kill(self.pid(node), signal.SIGKILL)

    def start(self, node):
        log = open(self.dir / node / "xsan.log", "a", encoding="utf-8")
        old = self.restarted.get(node)
        if old:
            old.wait()
        self.restarted[node] = subprocess.Popen([self.program, "node", "run", "--config", str(self.dir / node / "xsan.toml")],
                                                stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        log.close()
        self.dead.discard(node)

    def stop(self):
        for process in [*self.restarted.values(), self.server]:
            if process.poll() is None:
                process.terminate()
        for process in [*self.restarted.values(), self.server]:
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.log.close()


class Bench:
    def __init__(self, cluster, writer, rounds, kinds):
        self.cluster, self.writer, self.rounds, self.kinds = cluster, writer, rounds, kinds
        self.pauses = {kind: [] for kind in kinds}
        self.skipped = {kind: 0 for kind in kinds}
        self.errors = []

    def run(self):
        for number in range(self.rounds):
            for kind in self.kinds:
                try:
                    self.sample(kind)
                except KeyboardInterrupt:
                    say("interrupted: what was measured so far is told")
                    return
                except (RuntimeError, subprocess.TimeoutExpired, OSError, KeyError, ValueError) as error:
                    self.errors.append(f"{kind}: {error}")
                    say(f"  {kind}: {error}")
            if number % 5 == 4:
                say(f"{number + 1} of {self.rounds} rounds")

    def sample(self, kind):
        wait_for(self.cluster.is_whole, "the volume is whole", WHOLE_WITHIN)
        victim = self.victim(kind)
        if victim is None:
            self.skipped[kind] += 1
            return
        self.writer.forget()
        began = time.monotonic()
        if kind == "hand-over":
            self.cluster.xsan(victim, "volume", "attach", VOLUME)
            self.cluster.serving = victim
            self.watch(1.0)
        elif kind.endswith("frozen"):
            pid = self.cluster.pid(victim)
            os.kill(pid, signal.SIGSTOP)
            try:
                self.watch(FREEZE_SECONDS)
            finally:
                os.kill(pid, signal.SIGCONT)
        else:
            self.cluster.kill(victim)
            self.watch(KINDS[kind][1] / 1000 + 1.0)
            self.cluster.start(victim)
        pause, writes = self.writer.pause()
        self.pauses[kind].append(pause * 1000)
        say(f"  {kind:<15} {victim}  pause {pause * 1000:>6.0f} ms  ({writes} writes in {time.monotonic() - began:.1f} s)")

    def victim(self, kind):
        """The node it happens to. `None`: no node has this part now."""
        status = self.cluster.status()
        nodes = {node["name"]: node for node in status["nodes"]}
        serving = status["volumes"][0]["node"]
        leader = next((name for name, node in nodes.items() if node["metadata"] == "leader"), None)
        if kind == "gateway-killed":
            return serving
        if kind == "hand-over":
            return random.choice([name for name in nodes if name != serving])
        members = [name for name, node in nodes.items() if node["members"] > 0 and name != serving]
        if kind.startswith("leader"):
            return self.leading_member(leader, members)
        others = [name for name in members if name != leader]
        return random.choice(others) if others else None

    def leading_member(self, leader, members):
        """A member of the journal set that leads the metadata: leaders are started again until the lead has come to one."""
        for _ in range(8):
            if leader in members:
                return leader
            if leader == self.cluster.serving:
                other = random.choice([name for name in self.cluster.nodes if name != leader])
                self.cluster.xsan(other, "volume", "attach", VOLUME)
                self.cluster.serving = other
            elif leader is not None:
                self.cluster.kill(leader)
                self.watch(4.0)
                self.cluster.start(leader)
            wait_for(self.cluster.is_whole, "the volume is whole", WHOLE_WITHIN)
            nodes = {node["name"]: node for node in self.cluster.status()["nodes"]}
            leader = next((name for name, node in nodes.items() if node["metadata"] == "leader"), None)
            members = [name for name, node in nodes.items() if node["members"] > 0 and name != self.cluster.serving]
        return None

    def watch(self, seconds):
        """That long, and until writes are answered again."""
        end = time.monotonic() + seconds
        limit = end + 60
        while time.monotonic() < end or time.monotonic() - self.writer.answered > 0.5:
            if time.monotonic() > limit:
                raise RuntimeError("no write was answered for 60 s")
            time.sleep(0.02)


def percentile(values, part):
    values = sorted(values)
    return values[min(len(values) - 1, int(part * len(values)))] if values else None


def fill(program_dir, gib):
    began = time.monotonic()
    command = ["fio", "--name=fill", "--ioengine=nbd", f"--uri=nbd+unix:///{VOLUME}?socket={program_dir / 'n1' / 'nbd.sock'}",
               "--thread", "--rw=randwrite", "--bs=4k", "--iodepth=64", f"--size={gib}g", "--random_generator=lfsr",
               "--randrepeat=0", "--end_fsync=1", "--output-format=json"]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"fio: {done.stderr.strip()[-400:]}")
    say(f"{gib} GiB of random 4k writes in {time.monotonic() - began:.0f} s")


def report(bench, gib, rounds):
    lines = ["# Failover", "",
             f"{time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}; {os.cpu_count()} CPUs for six nodes and the client, Linux {os.uname().release}; "
             f"rs(4,2), a volume with {gib:g} GiB of random 4k data, {rounds} rounds, load {os.getloadavg()[0]:.1f}.",
             "Pause of a client that writes 4 KiB at a time, in milliseconds:", "",
             "| kind | what happens | runs | p50 | p99 | most | wanted |", "|---|---|--:|--:|--:|--:|--:|"]
    for kind, pauses in bench.pauses.items():
        what, goal = KINDS[kind]
        found = [f"{percentile(pauses, part):.0f}" if pauses else "-" for part in (0.5, 0.99)]
        most = f"{max(pauses):.0f}" if pauses else "-"
        lines.append(f"| {kind} | {what} | {len(pauses)} | {found[0]} | {found[1]} | {most} | <= {goal} |")
    if any(bench.skipped.values()):
        left = ", ".join(f"{kind} {count}" for kind, count in bench.skipped.items() if count)
        lines += ["", f"Left out, because no node had the part: {left}."]
    if bench.errors:
        lines += ["", "Errors:", "", *(f"- {error}" for error in bench.errors)]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", required=True, type=Path, help="scratch folder; made and emptied")
    parser.add_argument("--xsan", help="the xsan program (default: the release build)")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--gib", type=int, default=20, help="random 4k data in the volume")
    parser.add_argument("--kinds", default=",".join(KINDS), help="only these (comma)")
    parser.add_argument("--out", type=Path, help="write PATH.md and PATH.json")
    arguments = parser.parse_args()
    program = Path(arguments.xsan or Path(__file__).resolve().parent.parent / "target/release/xsan").resolve()
    scratch = arguments.dir.resolve() / "failover-bench"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    # Shards 1.5 times, and room for journals, checkpoints and what is not freed yet.
    # What is written meanwhile stays: there is no cleaning yet.
    needed = (arguments.gib * 1.5 + arguments.rounds + 10) * GIB
    if shutil.disk_usage(scratch).free < needed:
        sys.exit(f"{scratch} needs {needed / GIB:.0f} GiB of room")
    cluster = Cluster(program, scratch, max(4, arguments.gib * 2 // 4 + arguments.rounds // 4))
    try:
        cluster.xsan("n1", "volume", "create", VOLUME, "--size", f"{max(arguments.gib, 1)}GiB")
        cluster.xsan("n1", "volume", "attach", VOLUME)
        if arguments.gib:
            fill(cluster.dir, arguments.gib)
        writer = Writer(cluster, max(arguments.gib, 1) * GIB)
        writer.start()
        bench = Bench(cluster, writer, arguments.rounds, arguments.kinds.split(","))
        bench.run()
        writer.stopped = True
        writer.join(60)
        text = report(bench, arguments.gib, arguments.rounds)
        print(text)
        if arguments.out:
            arguments.out.with_suffix(".md").write_text(text, encoding="utf-8")
            record = {"gib": arguments.gib, "pauses_ms": bench.pauses, "errors": bench.errors}
            arguments.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        return 1 if bench.errors else 0
    finally:
        cluster.stop()
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
