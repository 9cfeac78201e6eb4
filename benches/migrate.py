#!/usr/bin/python3
"""A guest that writes without a pause migrates from host to host, with its disk on each host's own gateway (RFC 0008).

Three real processes (`xsan dev --processes`), two QEMU processes, and a guest of 512 bytes: a boot sector on the volume that counts, writes
the count to its disk, reads it back, compares, and says each count on its serial port. The guest must never see an error, and no count may be
missing: what the source wrote last is what the target goes on from. Prints the longest time between two counts of each migration.
Needs only the standard library, qemu-system-x86 (TCG is enough), binutils, and a build of xsan.
"""

import argparse
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

BOOT = r"""
.code16
.org 0
    xor %ax, %ax
    mov %ax, %ds
    mov %ax, %es
    mov %ax, %ss
    mov $0x7c00, %sp
    mov %dl, drive
again:
    incl 0x8000
    mov $0x4300, %ax
    mov $write, %si
    mov drive, %dl
    int $0x13
    jc failed
    mov $0x4200, %ax
    mov $read, %si
    mov drive, %dl
    int $0x13
    jc failed
    mov 0x8000, %eax
    cmp 0x8200, %eax
    jne wrong
    mov $0x3f8, %dx
    mov $4, %cx
say:
    out %al, %dx
    shr $8, %eax
    loop say
    jmp again
failed:
    mov $0xee, %al
    jmp end
wrong:
    mov $0xbb, %al
end:
    mov $0x3f8, %dx
    mov $8, %cx
last:
    out %al, %dx
    loop last
stop:
    hlt
    jmp stop
drive: .byte 0
write: .byte 16, 0, 1, 0
    .word 0x8000, 0
    .quad 64
read: .byte 16, 0, 1, 0
    .word 0x8200, 0
    .quad 64
.org 510
.word 0xaa55
"""


def say(text):
    print(text, file=sys.stderr, flush=True)


def wait_for(condition, what, limit=60):
    end = time.monotonic() + limit
    while not condition():
        if time.monotonic() > end:
            raise RuntimeError(f"not within {limit} s: {what}")
        time.sleep(0.02)


def boot_sector(scratch):
    (scratch / "boot.s").write_text(BOOT, encoding="ascii")
    subprocess.run(["as", "--32", "-o", scratch / "boot.o", scratch / "boot.s"], check=True)
    linked = ["ld", "-m", "elf_i386", "-e", "0x7c00", "-Ttext", "0x7c00", "--oformat", "binary", "-o", scratch / "boot.bin", scratch / "boot.o"]
    subprocess.run(linked, check=True)
    return (scratch / "boot.bin").read_bytes()[:512]


class Serial(threading.Thread):
    """What the guest says, with the time."""

    def __init__(self, path):
        super().__init__(daemon=True)
        self.path, self.counts, self.times, self.bytes = path, [], [], b""

    def listen(self):
        self.server = socket.socket(socket.AF_UNIX)
        self.server.bind(str(self.path))
        self.server.listen(1)
        self.start()

    def run(self):
        connection, _ = self.server.accept()
        while True:
            part = connection.recv(65536)
            if not part:
                return
            self.bytes += part
            while len(self.bytes) >= 4:
                (count,) = struct.unpack("<I", self.bytes[:4])
                self.bytes = self.bytes[4:]
                self.counts.append(count)
                self.times.append(time.monotonic())


class Guest:
    """A QEMU process on a host; `incoming`: it waits for a migration."""

    def __init__(self, number, scratch, gateway, incoming):
        self.monitor_path, self.incoming = scratch / f"qmp{number}", scratch / f"incoming{number}"
        self.serial = Serial(scratch / f"serial{number}")
        self.serial.listen()
        disk = {"driver": "nbd", "node-name": "d0", "server": {"type": "unix", "path": str(gateway)}, "export": "vm1",
                "reconnect-delay": 60, "cache": {"direct": True, "no-flush": False}}
        command = ["qemu-system-x86_64", "-machine", "pc,accel=tcg", "-m", "32", "-display", "none", "-nodefaults", "-no-user-config",
                   "-blockdev", json.dumps(disk), "-device", "virtio-blk-pci,drive=d0,bootindex=0",
                   "-chardev", f"socket,id=s0,path={self.serial.path}", "-serial", "chardev:s0",
                   "-qmp", f"unix:{self.monitor_path},server=on,wait=off"]
        if incoming:
            command += ["-incoming", f"unix:{self.incoming}"]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        wait_for(lambda: self.process.poll() is not None or self.monitor_path.exists(), "QEMU's monitor")
        if self.process.poll() is not None:
            raise RuntimeError("QEMU ended: its disk was refused")
        self.monitor = socket.socket(socket.AF_UNIX)
        self.monitor.connect(str(self.monitor_path))
        self.lines = self.monitor.makefile("r", encoding="utf-8")
        self.lines.readline()
        self.ask("qmp_capabilities")

    def ask(self, command, **arguments):
        self.monitor.sendall(json.dumps({"execute": command, "arguments": arguments}).encode())
        while True:
            answer = json.loads(self.lines.readline())
            if "error" in answer:
                raise RuntimeError(f"{command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]

    def end(self):
        # Asked to end, a source whose disk has moved would first wait for its reconnect-delay.
        self.process.kill()
        self.process.wait()


def xsan(program, cluster, node, *words, check=True):
    done = subprocess.run([program, "--admin", cluster / node / "admin.sock", "--output", "json", *words], capture_output=True, text=True,
                          check=False)
    if check and done.returncode != 0:
        raise RuntimeError(f"xsan {' '.join(words)} at {node}: {done.stderr.strip()}")
    return json.loads(done.stdout) if done.returncode == 0 and done.stdout else None


def migrate(program, cluster, scratch, source, number, target_node):
    """One migration; answers the guest at its new place and the pause in milliseconds."""
    try:
        Guest(f"{number}-refused", scratch, cluster / target_node / "nbd.sock", True).end()
    except (RuntimeError, OSError, ValueError):
        # QEMU ends.
        pass
    else:
        raise RuntimeError("the target was let in without having been told")
    xsan(program, cluster, target_node, "volume", "attach", "vm1", "--standby")
    target = Guest(number, scratch, cluster / target_node / "nbd.sock", True)
    before = len(source.serial.counts)
    source.ask("migrate", uri=f"unix:{target.incoming}")
    wait_for(lambda: source.ask("query-migrate").get("status") in ("completed", "failed"), "the migration")
    if source.ask("query-migrate")["status"] != "completed":
        raise RuntimeError("the migration failed")
    wait_for(lambda: len(target.serial.counts) > 20, "the guest goes on at its new place")
    source.end()
    source.serial.join()
    counts, times = source.serial.counts + target.serial.counts[:20], source.serial.times + target.serial.times[:20]
    if counts != list(range(counts[0], counts[0] + len(counts))):
        raise RuntimeError(f"counts are missing, or the guest saw an error: {counts[-24:]}")
    gaps = [after - earlier for earlier, after in zip(times[before:], times[before + 1:])]
    return target, max(gaps) * 1000


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True, help="a directory for files that are removed at the end")
    parser.add_argument("--xsan", type=Path, default=Path("target/release/xsan"), help="the program")
    parser.add_argument("--times", type=int, default=6, help="migrations")
    options = parser.parse_args()
    scratch = options.dir / f"migrate-{os.getpid()}"
    cluster = scratch / "c"
    scratch.mkdir(parents=True)
    log = open(scratch / "xsan.log", "w", encoding="utf-8")
    server = subprocess.Popen([options.xsan, "dev", "--processes", "--nodes", "3", "--dir", cluster, "--device-size", "2GiB"],
                              stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    guest = None
    try:
        wait_for(lambda: (xsan(options.xsan, cluster, "n1", "status", check=False) or {}).get("pools"), "the cluster is up")
        xsan(options.xsan, cluster, "n1", "volume", "create", "vm1", "--size", "64MiB")
        image = scratch / "boot.img"
        image.write_bytes(boot_sector(scratch))
        uri = f"nbd+unix:///vm1?socket={cluster}/n1/nbd.sock"
        subprocess.run(["qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", image, uri], check=True)
        guest = Guest(0, scratch, cluster / "n1" / "nbd.sock", False)
        wait_for(lambda: len(guest.serial.counts) > 50, "the guest runs")
        pauses = []
        for number in range(1, options.times + 1):
            node = f"n{number % 3 + 1}"
            guest, pause = migrate(options.xsan, cluster, scratch, guest, number, node)
            pauses.append(pause)
            say(f"migration {number} to {node}: the guest paused for {pause:.0f} ms; count {guest.serial.counts[-1]}")
            time.sleep(1)
        pauses.sort()
        print(json.dumps({"migrations": len(pauses), "pause_ms": {"median": round(pauses[len(pauses) // 2]), "longest": round(pauses[-1])}}))
    finally:
        if guest is not None:
            guest.end()
        server.terminate()
        server.wait()
        shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
