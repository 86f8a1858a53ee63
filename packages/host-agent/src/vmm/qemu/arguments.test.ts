import assert from "node:assert/strict";
import { test } from "vitest";
import { kernelCommandLine, qemuArguments, type QemuMachine } from "./arguments.ts";
import { chainNodes, diskNode } from "./block-graph.ts";

const machine: QemuMachine = {
  acceleration: "tcg",
  shape: { vcpus: 2, memoryMb: 512 },
  nic: { kind: "tap", netnsPath: "/run/netns/rk-1", tapName: "tap0", mac: "52:54:00:00:00:01" },
  blockNodes: [
    ...chainNodes(
      {
        kind: "file-chain",
        sizeBytes: 1 << 30,
        nodes: [
          { file: "top.qcow2", format: "qcow2", readOnly: false },
          { file: "image.raw", format: "raw", readOnly: true },
        ],
      },
      1,
      "/vm",
    ),
    diskNode(1),
  ],
  start: { kind: "clone" },
};

test("a clone's command line is this one", () => {
  assert.deepEqual(qemuArguments(machine), [
    ...["-M", "microvm,pit=on,pic=on,rtc=on,acpi=on,memory-backend=m,mem-merge=off,dump-guest-core=off"],
    ...["-accel", "tcg,thread=multi,tb-size=128"],
    ...["-cpu", "max"],
    ...["-smp", "cpus=2,maxcpus=2"],
    ...["-m", "512M"],
    "-object",
    "memory-backend-file,id=m,size=512M,mem-path=/proc/self/fd/3,share=off,merge=off,dump=off",
    "-nodefaults",
    "-no-user-config",
    ...["-display", "none"],
    ...["-chardev", "ringbuf,id=con,size=65536"],
    ...["-serial", "chardev:con"],
    ...["-chardev", "socket,id=qmp,fd=6,server=on,wait=off"],
    ...["-mon", "chardev=qmp,mode=control"],
    "-blockdev",
    '{"driver":"file","node-name":"b1-1-file","filename":"/vm/image.raw","read-only":true}',
    "-blockdev",
    '{"driver":"raw","node-name":"b1-1","file":"b1-1-file","read-only":true}',
    "-blockdev",
    '{"driver":"file","node-name":"t1-file","filename":"/vm/top.qcow2","read-only":false,"discard":"unmap"}',
    "-blockdev",
    '{"driver":"qcow2","node-name":"t1","file":"t1-file","read-only":false,"discard":"unmap","backing":"b1-1"}',
    "-blockdev",
    '{"driver":"raw","node-name":"d0","file":"t1","discard":"unmap"}',
    ...["-device", "virtio-blk-device,drive=d0,id=blk0"],
    ...["-netdev", "tap,id=net0,ifname=tap0,script=no,downscript=no"],
    ...["-device", "virtio-net-device,netdev=net0,id=nic0,mac=52:54:00:00:00:01"],
    ...["-action", "reboot=shutdown,shutdown=pause,panic=pause"],
    ...["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"],
    ...["-S", "-incoming", "defer"],
  ]);
});

test("template and clone are one machine: they differ in memory's sharing and in how they start", () => {
  const clone = qemuArguments(machine);
  const boot = qemuArguments({ ...machine, start: { kind: "boot", cmdline: "quiet" } });
  const only = (these: string[], those: string[]): string[] => these.filter((each) => !those.includes(each));
  assert.deepEqual(only(clone, boot), [
    "memory-backend-file,id=m,size=512M,mem-path=/proc/self/fd/3,share=off,merge=off,dump=off",
    ...["-S", "-incoming", "defer"],
  ]);
  assert.deepEqual(only(boot, clone), [
    "memory-backend-file,id=m,size=512M,mem-path=/proc/self/fd/3,share=on,merge=off,dump=off",
    ...["-kernel", "/proc/self/fd/7", "-initrd", "/proc/self/fd/8", "-append", "quiet"],
  ]);
});

test("a user-mode network reaches nothing but what is forwarded on loopback", () => {
  const nic = { kind: "user" as const, mac: "m", forwards: [{ hostPort: 20_001, guestPort: 49_983 }] };
  const given = qemuArguments({ ...machine, nic });
  assert.equal(
    given[given.indexOf("-netdev") + 1],
    "user,id=net0,restrict=on,ipv6=off,hostfwd=tcp:127.0.0.1:20001-:49983",
  );
});

test("KVM gives the guest the host's CPU", () => {
  const given = qemuArguments({ ...machine, acceleration: "kvm" });
  assert.equal(given[given.indexOf("-accel") + 1], "kvm");
  assert.equal(given[given.indexOf("-cpu") + 1], "host");
});

test("the kernel is told the host's TSC rate, and nothing twice", () => {
  assert.equal(
    kernelCommandLine("quiet  no_timer_check", 2_096_023),
    "quiet no_timer_check console=ttyS0 tsc_early_khz=2096023 tsc=reliable",
  );
});
