#!/usr/bin/python3
"""Memory of a whole six-node process: idle volumes, and random writes all over a large volume. Not timed, run alone.

`xsan dev` is started on its own; 100 volumes are written to once and left connected to nothing, then one volume of 1 TiB
takes random 4 KiB writes. Prints resident memory as the kernel counts it. See README.md here.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.dont_write_bytecode = True
import nbd  # noqa: E402  (the module beside this one)

IDLE_VOLUMES = 100


def resident(process):
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


def mib(value):
    return f"{value / (1 << 20):.1f} MiB"


def idle_volumes(cluster, process):
    """Resident memory that one more idle volume costs: opened, written to, flushed, at rest."""
    def touch(name):
        cluster.xsan("volume", "create", name, "--size", "1TiB")
        uri = f"nbd+unix:///{name}?socket={cluster.dir / 'nbd.sock'}"
        nbd.run("qemu-io", "-f", "raw", "-c", "write 0 4k", "-c", "write 100G 4k", "-c", "flush", uri)

    # What the first ones cost is not theirs alone.
    for number in range(20):
        touch(f"first{number}")
    process.settle()
    before = resident(process)
    for number in range(IDLE_VOLUMES):
        touch(f"idle{number}")
    process.settle(60)
    return (resident(process) - before) / IDLE_VOLUMES


def random_writes(cluster, process, gib):
    """Peak and final resident memory while `gib` GiB of random 4 KiB blocks are written all over 1 TiB."""
    cluster.xsan("volume", "create", "large", "--size", "1TiB")
    uri = f"nbd+unix:///large?socket={cluster.dir / 'nbd.sock'}"
    process.forget_peak()
    nbd.run("fio", "--name=random", "--ioengine=nbd", f"--uri={uri}", "--rw=randwrite", "--bs=4k", "--iodepth=32",
            "--size=1t", f"--io_size={gib}g", "--norandommap", "--randrepeat=0", "--end_fsync=1", timeout=7200)
    process.settle(60)
    return process.peak_bytes(), resident(process)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", required=True, type=Path, help="scratch folder; needs 2.5 times --gib")
    parser.add_argument("--xsan", default=Path(__file__).parent.parent / "target/release/xsan", type=Path)
    parser.add_argument("--gib", default=20, type=int, help="random writes in GiB")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.dir, prefix="memory-") as scratch:
        cluster = nbd.Cluster(options.xsan, Path(scratch))
        try:
            process = nbd.Process(cluster.server.pid)
            process.settle()
            print(f"at rest, no volume: {mib(resident(process))}", flush=True)
            print(f"an idle volume: {mib(idle_volumes(cluster, process))}", flush=True)
            peak, final = random_writes(cluster, process, options.gib)
            print(f"{options.gib} GiB of random 4 KiB writes over 1 TiB: peak {mib(peak)}, then {mib(final)}", flush=True)
            status = json.loads(cluster.xsan("volume", "stat", "large", "--output", "json"))
            print(f"segments: {status['engine']['segments']}, delta: {mib(status['engine']['delta_bytes'])}")
        finally:
            cluster.stop()


if __name__ == "__main__":
    main()
