/**
 * QEMU's command line, as a pure function of what a VM is made of.
 *
 * Boot and clone must give QEMU the same machine: same devices, in the same
 * order, with the same ids, and the memory object's id is in the device state
 * too. They differ in memory (shared or private), kernel, and `-incoming`.
 *
 * Left out on purpose: balloon, virtio-mem, prealloc, memory locking and merging
 * (each would write to or punch holes into the base that clones share), and for
 * clones kernel and initrd (14 MB a VM; they are in the guest's memory already).
 */
import type { GuestNic } from "../../guest-network/guest-network.ts";
import type { VmShape } from "../vmm.ts";
import type { BlockNode } from "./qmp-commands.ts";

export type Acceleration = "kvm" | "tcg";

/** Descriptors that the VMM's process inherits. */
export const VMM_FD = {
  /** The guest's memory: for a clone a sealed memfd. */
  memory: 3,
  /** A memfd from which a clone's device state is loaded; QEMU closes the descriptor then. */
  stream: 4,
  /** The same memfd again, for device states that are saved by path. */
  state: 5,
  /** The listening socket of QMP. */
  qmp: 6,
  kernel: 7,
  initrd: 8,
} as const;

export const DISK_NODE = "d0";
export const DISK_DEVICE = "blk0";
export const CONSOLE_CHARDEV = "con";
/** The console's last bytes are kept in QEMU's memory: a guest may write as much as it likes. */
export const CONSOLE_BYTES = 64 << 10;

/**
 * Room for translated code. QEMU's own default is 1 GiB; a warm base guest
 * fills about 20 MiB, and when the room is full it is emptied and filled anew.
 */
export const TCG_CODE_CACHE_MB = 128;

export interface QemuMachine {
  acceleration: Acceleration;
  shape: VmShape;
  nic: GuestNic;
  /** Bottom first; the last one is DISK_NODE. */
  blockNodes: readonly BlockNode[];
  start: { kind: "clone" } | { kind: "boot"; cmdline: string };
}

function netdev(nic: GuestNic): string {
  if (nic.kind === "simulated") throw new Error("a simulated network has no card for a real guest");
  if (nic.kind === "tap") return `tap,id=net0,ifname=${nic.tapName},script=no,downscript=no`;
  const forwards = nic.forwards.map(
    ({ hostPort, guestPort }) => `hostfwd=tcp:127.0.0.1:${hostPort}-:${guestPort}`,
  );
  // restrict=on: without it a guest reaches the host's loopback.
  return ["user,id=net0,restrict=on,ipv6=off", ...forwards].join(",");
}

export function qemuArguments(machine: QemuMachine): string[] {
  const { acceleration, shape, nic, blockNodes, start } = machine;
  const boots = start.kind === "boot";
  const memory = [
    `memory-backend-file,id=m,size=${shape.memoryMb}M`,
    `mem-path=/proc/self/fd/${VMM_FD.memory}`,
    `share=${boots ? "on" : "off"},merge=off,dump=off`,
  ].join(",");
  return [
    ...["-M", "microvm,pit=on,pic=on,rtc=on,acpi=on,memory-backend=m,mem-merge=off,dump-guest-core=off"],
    ...["-accel", acceleration === "tcg" ? `tcg,thread=multi,tb-size=${TCG_CODE_CACHE_MB}` : "kvm"],
    ...["-cpu", acceleration === "tcg" ? "max" : "host"],
    ...["-smp", `cpus=${shape.vcpus},maxcpus=${shape.vcpus}`],
    ...["-m", `${shape.memoryMb}M`],
    ...["-object", memory],
    "-nodefaults",
    "-no-user-config",
    ...["-display", "none"],
    ...["-chardev", `ringbuf,id=${CONSOLE_CHARDEV},size=${CONSOLE_BYTES}`],
    ...["-serial", `chardev:${CONSOLE_CHARDEV}`],
    ...["-chardev", `socket,id=qmp,fd=${VMM_FD.qmp},server=on,wait=off`],
    ...["-mon", "chardev=qmp,mode=control"],
    ...blockNodes.flatMap((node) => ["-blockdev", JSON.stringify(node)]),
    ...["-device", `virtio-blk-device,drive=${DISK_NODE},id=${DISK_DEVICE}`],
    ...["-netdev", netdev(nic)],
    ...["-device", `virtio-net-device,netdev=net0,id=nic0,mac=${nic.mac}`],
    // A guest that ends stays as it is until the agent has asked why.
    ...["-action", "reboot=shutdown,shutdown=pause,panic=pause"],
    ...["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"],
    ...(boots
      ? [
          ...["-kernel", `/proc/self/fd/${VMM_FD.kernel}`],
          ...["-initrd", `/proc/self/fd/${VMM_FD.initrd}`],
          ...["-append", start.cmdline],
        ]
      : ["-S", "-incoming", "defer"]),
  ];
}

/**
 * The image's kernel arguments and ours. Under TCG booting is a coin flip
 * ("Marking TSC unstable", then nothing) without the last three.
 */
export function kernelCommandLine(imageCmdline: string, tscKhz: number): string {
  const given = imageCmdline.split(" ").filter((argument) => argument !== "");
  const ours = ["console=ttyS0", `tsc_early_khz=${tscKhz}`, "tsc=reliable", "no_timer_check"];
  return [...given, ...ours.filter((argument) => !given.includes(argument))].join(" ");
}
