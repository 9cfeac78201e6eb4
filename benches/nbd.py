#!/usr/bin/python3
"""Speed of a volume over NBD, beside a plain raw file served by qemu-nbd and beside the disk itself, in one run.

Runs fio jobs against all targets in turn, round by round, so that what else happens on the machine hits all alike, and
writes medians, ratios and the goals of this project as Markdown, and every sample as JSON. See README.md here.
Needs only the standard library, fio with the nbd engine, qemu-nbd, and a release build of xsan.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

GIB = 1 << 30
TICKS = os.sysconf("SC_CLK_TCK")

# name: (rw, block size, queue depth, more fio options)
JOBS = {
    "randwrite-4k-qd1": ("randwrite", "4k", 1, []),
    "randwrite-4k-qd32": ("randwrite", "4k", 32, []),
    "randwrite-4k-qd128": ("randwrite", "4k", 128, []),
    "randwrite-4k-qd1-fsync": ("randwrite", "4k", 1, ["--fsync=1"]),
    "randwrite-64k-qd16": ("randwrite", "64k", 16, []),
    "write-1m-qd8": ("write", "1m", 8, []),
    "read-1m-qd8": ("read", "1m", 8, []),
    "randread-4k-qd1": ("randread", "4k", 1, []),
    "randread-4k-qd32": ("randread", "4k", 32, []),
    "randread-4k-qd128": ("randread", "4k", 128, []),
}
# The modes that flush before they acknowledge are measured where that matters.
SYNCED_JOBS = {"randwrite-4k-qd1", "randwrite-4k-qd32", "randwrite-4k-qd1-fsync"}
BASE, BASE_SYNCED = "qemu-raw", "qemu-dsync"
PROCESSES = "xsan-ec42-processes"


def is_read(job):
    return "read" in JOBS[job][0]


def say(text):
    print(text, file=sys.stderr, flush=True)


def run(*command, **options):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, stdin=subprocess.DEVNULL,
                          timeout=options.pop("timeout", 300), check=False, **options)
    if done.returncode != 0:
        tail = "\n".join((done.stderr + done.stdout).strip().splitlines()[-8:])
        raise RuntimeError(f"{' '.join(str(word) for word in command)}: exit {done.returncode}\n{tail}")
    return done.stdout


class Process:
    """What the kernel counts for one process, all its threads and those that have ended."""

    def __init__(self, pid):
        self.pid = pid

    def cpu_seconds(self):
        fields = Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def io(self):
        lines = Path(f"/proc/{self.pid}/io").read_text().splitlines()
        counts = {name: int(value) for name, value in (line.split(": ") for line in lines)}
        return counts["read_bytes"], counts["write_bytes"]

    def forget_peak(self):
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")

    def peak_bytes(self):
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        return 0

    def settle(self, limit=20.0):
        """Waits until the process rests, so that work put off (seals, frees) counts for the job that caused it."""
        end = time.monotonic() + limit
        quiet = 0
        before = self.cpu_seconds()
        while quiet < 3 and time.monotonic() < end:
            time.sleep(0.2)
            now = self.cpu_seconds()
            quiet = quiet + 1 if now - before <= 0.02 else 0
            before = now


class Group(Process):
    """Several processes that serve together: all of them count; `roles` says who does what."""

    def __init__(self, roles):
        self.roles = {role: [Process(pid) for pid in pids] for role, pids in roles.items()}
        self.all = [process for processes in self.roles.values() for process in processes]

    def cpu_seconds(self):
        return sum(process.cpu_seconds() for process in self.all)

    def cpu_seconds_by_role(self):
        return {role: sum(process.cpu_seconds() for process in processes) for role, processes in self.roles.items()}

    def io(self):
        return tuple(map(sum, zip(*(process.io() for process in self.all))))

    def forget_peak(self):
        for process in self.all:
            process.forget_peak()

    def peak_bytes(self):
        return sum(process.peak_bytes() for process in self.all)


class Target:
    """Something fio can write to. `open` makes a volume with nothing but zeroes or old bench data in it."""

    synced = False

    def open(self, volume):
        """Returns the fio options that reach the volume."""
        raise NotImplementedError

    def close(self, volume):
        """Deletes the volume; gives its space back."""

    def process(self):
        """The server, if there is one."""
        return None

    def counters(self):
        """The server's own counters, for the record."""
        return None


class File(Target):
    """fio straight on a file of the same disk: what the disk can do."""

    name = "disk"

    def __init__(self, path):
        self.path = path

    def open(self, volume):
        return ["--ioengine=io_uring", "--direct=1", f"--filename={self.path}"]


class Qemu(Target):
    """qemu-nbd on a raw file: no redundancy, no checksums. One server for each job."""

    def __init__(self, name, path, scratch, cache, synced):
        self.name, self.path, self.cache, self.synced = name, path, cache, synced
        self.socket = scratch / f"{name}.sock"
        self.server = None

    def open(self, volume):
        self.socket.unlink(missing_ok=True)
        self.server = subprocess.Popen(
            ["qemu-nbd", "-t", "-e", "8", "-f", "raw", "-k", str(self.socket), "-x", "vol", "--discard=unmap",
             f"--cache={self.cache}", "--aio=io_uring", str(self.path)], stdin=subprocess.DEVNULL)
        wait_for(self.socket.exists, self.server, "qemu-nbd")
        return ["--ioengine=nbd", f"--uri=nbd+unix:///vol?socket={self.socket}"]

    def close(self, volume):
        stop(self.server)
        self.server = None

    def process(self):
        return Process(self.server.pid)


class Cluster:
    """`xsan dev` for the whole run; several targets share it."""

    options = []
    # Where the node lies whose gateway serves.
    serving = ""

    def __init__(self, program, scratch):
        self.program, self.dir = program, scratch / type(self).__name__.lower()
        self.log = open(scratch / f"{self.dir.name}.log", "w", encoding="utf-8")
        self.server = subprocess.Popen([program, "dev", *self.options, "--dir", str(self.dir)], stdin=subprocess.DEVNULL,
                                       stdout=self.log, stderr=self.log)
        self.pools = set()

        def ready():
            try:
                self.xsan("status")
                return True
            except RuntimeError:
                return False

        wait_for(ready, self.server, "xsan dev")

    def xsan(self, *words):
        return run(self.program, "--admin", self.dir / self.serving / "admin.sock", *words)

    def socket(self):
        return self.dir / self.serving / "nbd.sock"

    def process(self):
        return Process(self.server.pid)

    def stop(self):
        stop(self.server)
        self.log.close()


class Processes(Cluster):
    """`xsan dev --processes`: six of them, over loopback TCP and TLS. The first one's gateway serves."""

    options = ["--processes"]
    serving = "n1"

    def process(self):
        pids = {node.name: int((node / "pid").read_text()) for node in sorted(self.dir.glob("n[0-9]*"))}
        return Group({"serving": [pids.pop(self.serving)], "storage": list(pids.values())})


class Xsan(Target):
    """Volumes of one pool in one acknowledgement mode."""

    def __init__(self, name, cluster, pool, pool_options, ack):
        self.name, self.cluster, self.pool, self.pool_options, self.ack = name, cluster, pool, pool_options, ack
        self.synced = ack == "persisted"

    def open(self, volume):
        if self.pool not in self.cluster.pools:
            self.cluster.xsan("pool", "create", self.pool, *self.pool_options)
            self.cluster.pools.add(self.pool)
        self.cluster.xsan("volume", "create", volume, "--size", f"{SIZE // GIB}GiB", "--pool", self.pool,
                          *(["--ack", self.ack] if self.ack != "replicated" else []))
        return ["--ioengine=nbd", f"--uri=nbd+unix:///{volume}?socket={self.cluster.socket()}"]

    def close(self, volume):
        self.cluster.xsan("volume", "delete", volume, "--yes", "--force")

    def process(self):
        return self.cluster.process()

    def counters(self):
        return json.loads(self.cluster.xsan("status", "--output", "json"))


def wait_for(condition, server, name, limit=60.0):
    end = time.monotonic() + limit
    while not condition():
        if server.poll() is not None:
            raise RuntimeError(f"{name} ended with {server.returncode} during its start")
        if time.monotonic() > end:
            raise RuntimeError(f"{name} was not ready after {limit:.0f} s")
        time.sleep(0.02)


def stop(server):
    if server is not None and server.poll() is None:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def fio(target_options, name, rw, block, depth, more):
    command = ["fio", f"--name={name}", "--output-format=json", "--thread", f"--rw={rw}", f"--bs={block}",
               f"--iodepth={depth}", f"--size={USED}", "--randrepeat=0", "--norandommap", "--group_reporting",
               "--percentile_list=50:99", *target_options, *more]
    output = run(*command, timeout=900)
    # Warnings may stand before the JSON.
    report = json.loads(output[output.index("{"):])
    job = report["jobs"][0]
    if job["error"]:
        raise RuntimeError(f"fio {name}: error {job['error']}")
    return job


def prefill(options):
    fio(options, "prefill", "write", "1m", 8, ["--end_fsync=1"])


def measure(target, options, job, seconds):
    """One sample: a job on a volume that is open and filled."""
    rw, block, depth, more = JOBS[job]
    side = "read" if is_read(job) else "write"
    more = [*more, "--time_based", f"--runtime={seconds}", *([] if side == "read" else ["--end_fsync=1"])]
    process = target.process()
    counters = None
    if process:
        process.settle()
        counters = target.counters()
        process.forget_peak()
        cpu, io = process.cpu_seconds(), process.io()
        roles = process.cpu_seconds_by_role() if isinstance(process, Group) else {}
    load = os.getloadavg()[0]
    result = fio(options, job, rw, block, depth, more)
    part = result[side]
    sample = {
        "iops": part["iops"],
        "bytes_per_second": part["bw_bytes"],
        "ios": part["total_ios"],
        "p50_us": part["clat_ns"]["percentile"]["50.000000"] / 1000,
        "p99_us": part["clat_ns"]["percentile"]["99.000000"] / 1000,
        "load": load,
    }
    if process:
        process.settle()
        read, write = process.io()
        sample["cpu_us_per_io"] = (process.cpu_seconds() - cpu) * 1e6 / part["total_ios"]
        if roles:
            sample["cpu_us_per_io_by_role"] = {role: (seconds - roles[role]) * 1e6 / part["total_ios"]
                                               for role, seconds in process.cpu_seconds_by_role().items()}
        sample["device_read_bytes"] = read - io[0]
        sample["device_write_bytes"] = write - io[1]
        if side == "write":
            sample["device_bytes_per_user_byte"] = (write - io[1]) / part["io_bytes"]
        sample["rss_peak_bytes"] = process.peak_bytes()
    if counters is not None:
        sample["counters"] = {"before": counters, "after": target.counters()}
    return sample


class Bench:
    """All samples of a run."""

    def __init__(self, targets, jobs, seconds):
        self.targets, self.jobs, self.seconds = targets, jobs, seconds
        self.samples = {}
        self.errors = []
        self.volumes = 0

    def wanted(self, target, job):
        return job in self.jobs and (not target.synced or job in SYNCED_JOBS)

    def volume(self):
        self.volumes += 1
        return f"bench-{self.volumes}"

    def sample(self, target, options, job):
        sample = measure(target, options, job, self.seconds)
        self.samples.setdefault(job, {}).setdefault(target.name, []).append(sample)
        say(f"  {job:<24} {target.name:<16} {sample['iops']:>9.0f} IOPS {sample['bytes_per_second'] / 1e6:>7.0f} MB/s"
            f"  cpu {sample.get('cpu_us_per_io', 0):>7.1f} us/io  p99 {sample['p99_us']:>8.0f} us"
            f"  load {sample['load']:.1f}")

    def attempt(self, work, what):
        try:
            work()
        except (RuntimeError, subprocess.TimeoutExpired, OSError, KeyError, ValueError) as error:
            self.errors.append(f"{what}: {error}")
            say(f"  {what}: {error}")

    def round(self, number):
        order = self.targets[number % len(self.targets):] + self.targets[:number % len(self.targets)]
        for job in [job for job in self.jobs if not is_read(job)]:
            for target in order:
                if self.wanted(target, job):
                    self.attempt(lambda: self.write_job(target, job), f"{job} on {target.name}")
        self.read_jobs(order)

    def write_job(self, target, job):
        """Nothing cleans dead segments yet: every write job has a volume of its own and gives the space back."""
        volume = self.volume()
        options = target.open(volume)
        try:
            prefill(options)
            self.sample(target, options, job)
        finally:
            target.close(volume)

    def read_jobs(self, order):
        """Reads change nothing: one filled volume of each target serves them all."""
        jobs = [job for job in self.jobs if is_read(job)]
        opened = []
        try:
            for target in order:
                if any(self.wanted(target, job) for job in jobs):
                    volume = self.volume()

                    def fill(target=target, volume=volume):
                        options = target.open(volume)
                        opened.append((target, volume, options))
                        prefill(options)

                    self.attempt(fill, f"prefill of {target.name}")
            for job in jobs:
                for target, _, options in opened:
                    if self.wanted(target, job):
                        self.attempt(lambda: self.sample(target, options, job), f"{job} on {target.name}")
        finally:
            for target, volume, _ in opened:
                self.attempt(lambda: target.close(volume), f"delete on {target.name}")

    def median(self, job, target, key):
        values = [sample[key] for sample in self.samples.get(job, {}).get(target, []) if key in sample]
        return statistics.median(values) if values else None

    def ratio(self, job, target, base):
        ours, theirs = self.median(job, target, "iops"), self.median(job, base, "iops")
        return ours / theirs if ours and theirs else None


def cell(value, form):
    return "-" if value is None else form.format(value)


def table(head, rows):
    lines = ["| " + " | ".join(head) + " |", "|---" + "|--:" * (len(head) - 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def speed_cell(bench, job, target):
    key, form, scale = ("bytes_per_second", "{:.0f} MB/s", 1e6) if "1m" in job else ("iops", "{:,.0f}", 1)
    value = bench.median(job, target, key)
    text = cell(value and value / scale, form)
    cpu = bench.median(job, target, "cpu_us_per_io")
    return text if cpu is None else f"{text} ({cpu:.1f})"


def goals(bench):
    """The goals, each with what was found; `None` where it was not measured."""
    write, read = "randwrite-4k-qd32", "randread-4k-qd32"
    device = "device_bytes_per_user_byte"
    peaks = [sample["rss_peak_bytes"] for targets in bench.samples.values()
             for target, samples in targets.items() if target.startswith("xsan") and target != PROCESSES for sample in samples]
    writes = [(sample["device_read_bytes"], sample["device_write_bytes"]) for job, targets in bench.samples.items()
              if not is_read(job) for target, samples in targets.items() if target.startswith("xsan") for sample in samples]
    reads = sum(read for read, _ in writes) / max(1, sum(write for _, write in writes)) if writes else None
    return [
        ("4k random write qd32, EC 4+2, of qemu-nbd raw", bench.ratio(write, "xsan-ec42", BASE), ">=", 1.0),
        ("4k random write qd32, EC 4+2, CPU us per write", bench.median(write, "xsan-ec42", "cpu_us_per_io"), "<=", 25),
        ("4k random write qd1, EC 4+2, of qemu-nbd raw", bench.ratio("randwrite-4k-qd1", "xsan-ec42", BASE), ">=", 0.6),
        ("4k random write qd32, EC 4+2 of replica-3", bench.ratio(write, "xsan-ec42", "xsan-rep3"), ">=", 0.9),
        ("4k random read qd32, EC 4+2, of qemu-nbd raw", bench.ratio(read, "xsan-ec42", BASE), ">=", 0.8),
        ("1M write qd8, EC 4+2, of qemu-nbd raw", bench.ratio("write-1m-qd8", "xsan-ec42", BASE), ">=", 0.6),
        ("4k random write qd32, ack = persisted, of qemu-nbd directsync",
         bench.ratio(write, "xsan-ec42-persisted", BASE_SYNCED), ">=", 0.5),
        ("4k random write qd1 fsync=1, EC 4+2, of qemu-nbd directsync",
         bench.ratio("randwrite-4k-qd1-fsync", "xsan-ec42", BASE_SYNCED), ">=", 0.5),
        ("device bytes per user byte, 4k random write qd32", bench.median(write, "xsan-ec42", device), "<=", 4.7),
        ("device bytes per user byte, 4k random write qd1", bench.median("randwrite-4k-qd1", "xsan-ec42", device), "<=", 5.2),
        ("device bytes per user byte, 1M write qd8", bench.median("write-1m-qd8", "xsan-ec42", device), "<=", 1.6),
        ("device reads per device write, all write jobs (bytes)", reads, "<=", 0),
        ("4k random write qd32, six processes of one process", bench.ratio(write, PROCESSES, "xsan-ec42"), ">=", 0.6),
        ("peak memory of the six-node process, GB", max(peaks) / 1e9 if peaks else None, "<=", 0.5),
    ]


def report(bench, arguments, rounds):
    names = [target.name for target in bench.targets]
    jobs = [job for job in bench.jobs if job in bench.samples]
    ours = [name for name in names if name.startswith("xsan")]
    loads = [sample["load"] for targets in bench.samples.values() for samples in targets.values() for sample in samples]
    cpu = next((line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), "unknown CPU")
    versions = ", ".join(run(program, "--version").splitlines()[0] for program in ("fio", "qemu-nbd"))
    text = [
        "# NBD bench",
        "",
        f"{time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}; {cpu}, {os.cpu_count()} CPUs, "
        f"Linux {os.uname().release}; {versions}.",
        f"Medians of {rounds} round(s) of {bench.seconds} s a job, targets interleaved; volume {SIZE // GIB} GiB, "
        f"{USED / GIB:g} GiB used and filled before; every write job ends with a flush. "
        f"Load average {min(loads, default=0):.1f} to {max(loads, default=0):.1f}.",
        "",
        "IOPS (1M: MB/s), in brackets CPU microseconds of the server per I/O, put-off work included:",
        "",
        table(["job", *names], [[job, *(speed_cell(bench, job, name) for name in names)] for job in jobs]),
    ]
    if ours:
        head = ["job", *(f"{name} / {BASE}" for name in ours), *(f"{name} / {BASE_SYNCED}" for name in ours)]
        rows = [[job, *(cell(bench.ratio(job, name, base), "{:.2f}") for base in (BASE, BASE_SYNCED) for name in ours)]
                for job in jobs]
        text += ["", "Ratios of the medians:", "", table(head, rows)]
    rows = [[job, *(f"{cell(bench.median(job, name, 'p50_us'), '{:,.0f}')} / {cell(bench.median(job, name, 'p99_us'), '{:,.0f}')}"
                    for name in names)] for job in jobs]
    text += ["", "Completion latency p50 / p99 in microseconds:", "", table(["job", *names], rows)]
    if ours:
        rows = [[job, *(f"{cell(bench.median(job, name, 'device_bytes_per_user_byte'), '{:.2f}')} / "
                        f"{cell((bench.median(job, name, 'device_read_bytes') or 0) / 1048576, '{:.1f}')} / "
                        f"{cell((bench.median(job, name, 'rss_peak_bytes') or 0) / 1e6, '{:.0f}')}" for name in ours)]
                for job in jobs]
        text += ["", "Device bytes written per user byte / MiB read from devices / peak memory in MB:", "",
                 table(["job", *ours], rows)]
        rows = [[what, cell(found, "{:.2f}"), f"{sign} {bound:g}",
                 "-" if found is None else "met" if (found >= bound if sign == ">=" else found <= bound) else "**missed**"]
                for what, found, sign, bound in goals(bench)]
        text += ["", "Goals:", "", table(["goal", "found", "wanted", ""], rows)]
    roles = [(job, bench.samples[job][PROCESSES]) for job in jobs if PROCESSES in bench.samples[job]]
    if roles:
        names = list(roles[0][1][0]["cpu_us_per_io_by_role"])
        rows = [[job, cell(bench.ratio(job, PROCESSES, "xsan-ec42"), "{:.2f}"),
                 *(f"{statistics.median(sample['cpu_us_per_io_by_role'][role] for sample in samples):.1f}" for role in names)]
                for job, samples in roles]
        text += ["", f"{PROCESSES}: ratio to one process, and CPU microseconds per I/O of the serving node (gateway, engine, its own "
                 "share of the devices) and of the five others together:", "", table(["job", "ratio", *names], rows)]
    if bench.errors:
        text += ["", "Errors:", "", *(f"- {error.splitlines()[0]}" for error in bench.errors)]
    return "\n".join(text) + "\n"


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", required=True, type=Path, help="scratch folder on the disk to measure; made and emptied")
    parser.add_argument("--xsan", help="the xsan program (default: the release build); `none`: only the others")
    parser.add_argument("--rounds", type=int, help="default 3")
    parser.add_argument("--seconds", type=int, help="length of a job, default 7")
    parser.add_argument("--quick", action="store_true", help="one round of 3 s a job, if not said otherwise")
    parser.add_argument("--size-gib", type=int, default=8, help="size of a volume")
    parser.add_argument("--used-gib", type=float, default=4, help="how much of it is filled and used")
    parser.add_argument("--jobs", help="only jobs whose name contains one of these words (comma)")
    parser.add_argument("--targets", help="only these targets (comma): xsan-ec42,xsan-rep3,xsan-ec42-persisted,"
                                          "xsan-ec42-processes (only if named),qemu-raw,qemu-dsync,disk")
    parser.add_argument("--out", type=Path, help="write PATH.md and PATH.json (default: only print the Markdown)")
    return parser.parse_args()


def make_targets(arguments, scratch, cluster, processes):
    raw = scratch / "raw.img"
    targets = [
        *([Xsan("xsan-ec42", cluster, "ec42", ["--ec", "4+2"], "replicated"),
           Xsan("xsan-rep3", cluster, "rep3", ["--replicas", "3"], "replicated"),
           Xsan("xsan-ec42-persisted", cluster, "ec42", ["--ec", "4+2"], "persisted")] if cluster else []),
        *([Xsan(PROCESSES, processes, "ec42", ["--ec", "4+2"], "replicated")] if processes else []),
        Qemu(BASE, raw, scratch, "none", False),
        Qemu(BASE_SYNCED, raw, scratch, "directsync", True),
        File(raw),
    ]
    if arguments.targets:
        wanted = arguments.targets.split(",")
        targets = [target for target in targets if target.name in wanted]
    return targets


def main():
    global SIZE, USED
    arguments = parse()
    SIZE, USED = arguments.size_gib * GIB, int(arguments.used_gib * GIB)
    seconds, rounds = arguments.seconds or (3 if arguments.quick else 7), arguments.rounds or (1 if arguments.quick else 3)
    for program in ("fio", "qemu-nbd"):
        if shutil.which(program) is None:
            sys.exit(f"{program} is missing (apt-get install {'fio' if program == 'fio' else 'qemu-utils'})")
    program = arguments.xsan or str(Path(__file__).resolve().parent.parent / "target/release/xsan")
    if program != "none" and not os.access(program, os.X_OK):
        sys.exit(f"{program} is not there: cargo build --release --bin xsan, or --xsan PROGRAM")
    jobs = [job for job in JOBS if not arguments.jobs or any(word in job for word in arguments.jobs.split(","))]

    arguments.dir.mkdir(parents=True, exist_ok=True)
    scratch = arguments.dir.resolve() / "nbd-bench"
    shutil.rmtree(scratch, ignore_errors=True)
    # The volumes of a read phase at the same time (1.5x, 3x and the raw file), and what a job of 1M writes adds.
    needed = int(USED * (1.5 + 3 + 1) + seconds * 2.5 * GIB) if program != "none" else USED + GIB
    free = shutil.disk_usage(arguments.dir).free
    if free < needed:
        sys.exit(f"{arguments.dir} has {free / GIB:.0f} GiB free, this needs {needed / GIB:.0f}")
    scratch.mkdir()
    clusters = [None, None]
    try:
        with open(scratch / "raw.img", "wb") as raw:
            raw.truncate(SIZE)
        if program != "none":
            clusters[0] = Cluster(program, scratch)
            # Only on demand: six more processes take part of the machine even when they rest.
            if PROCESSES in (arguments.targets or ""):
                clusters[1] = Processes(program, scratch)
        bench = Bench(make_targets(arguments, scratch, *clusters), jobs, seconds)
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}")
            bench.round(number)
        text = report(bench, arguments, rounds)
        print(text)
        if arguments.out:
            arguments.out.with_suffix(".md").write_text(text, encoding="utf-8")
            record = {"seconds": seconds, "rounds": rounds, "size_bytes": SIZE, "used_bytes": USED,
                      "samples": bench.samples, "errors": bench.errors}
            arguments.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        return 1 if bench.errors else 0
    finally:
        for cluster in filter(None, clusters):
            cluster.stop()
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
