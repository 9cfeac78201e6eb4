#!/usr/bin/env python3
"""Compares the gateway's memory server with nbdkit's memory plugin: fio's nbd engine over unix sockets, in one run.

    cargo build --release -p xsan-gateway --example memory_server
    gateway/examples/compare_nbdkit.py target/release/examples/memory_server [seconds a job]

Both volumes are written once in full first, so that no job pays for fresh memory. The jobs alternate between the two, so
that a disturbance of the machine meets both. CPU is the server's own, user and system, per I/O.
"""
import json
import os
import subprocess
import sys
import tempfile
import time

JOBS = [("randwrite", "4k", 1), ("randwrite", "4k", 32), ("randwrite", "4k", 128), ("randread", "4k", 1),
        ("randread", "4k", 32), ("randread", "4k", 128), ("write", "1M", 16), ("read", "1M", 16)]


def cpu_seconds(pid):
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def fio(socket, rw, block, depth, *more):
    command = ["fio", "--name=job", "--ioengine=nbd", f"--uri=nbd+unix:///?socket={socket}", f"--rw={rw}",
               f"--bs={block}", f"--iodepth={depth}", "--size=1G", "--output-format=json", *more]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    job = json.loads(output[output.index("{"):])["jobs"][0]
    return job["read" if "read" in rw else "write"], job["usr_cpu"] + job["sys_cpu"]


def main():
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    seconds = sys.argv[2] if len(sys.argv) > 2 else "5"
    with tempfile.TemporaryDirectory() as directory:
        ours, theirs = f"{directory}/ours", f"{directory}/nbdkit"
        servers = {
            "xsan": (ours, subprocess.Popen([sys.argv[1], "--socket", ours, "--size", "1GiB"], stdout=subprocess.DEVNULL)),
            "nbdkit": (theirs, subprocess.Popen(["nbdkit", "-f", "-U", theirs, "memory", "1G"])),
        }
        try:
            for socket, _ in servers.values():
                while not os.path.exists(socket):
                    time.sleep(0.05)
                fio(socket, "write", "1M", 8)
            print(f"{'job':18} {'server':7} {'IOPS':>8} {'MiB/s':>7} {'cpu us/io':>9} {'p50 us':>7} {'p99 us':>7} {'client cpu':>10}")
            for rw, block, depth in JOBS:
                for name, (socket, process) in servers.items():
                    before = cpu_seconds(process.pid)
                    done, client = fio(socket, rw, block, depth, "--time_based", f"--runtime={seconds}")
                    used = (cpu_seconds(process.pid) - before) * 1e6 / done["total_ios"]
                    late = done["clat_ns"]["percentile"]
                    print(f"{rw + ' ' + block + ' qd' + str(depth):18} {name:7} {done['iops']:8.0f} {done['bw'] / 1024:7.0f} "
                          f"{used:9.2f} {late['50.000000'] / 1000:7.0f} {late['99.000000'] / 1000:7.0f} {client:9.0f}%", flush=True)
        finally:
            for _, process in servers.values():
                process.terminate()
                process.wait()


main()
