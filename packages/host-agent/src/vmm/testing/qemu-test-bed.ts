/**
 * Real guests for tests: QEMU, qcow2 disks, user-mode network, envd in the guest.
 *
 * Everything lies in one temporary directory on the disk of the data directory;
 * VMMs run under uids of their own, as the product's do.
 */
import { randomBytes } from "node:crypto";
import { chmod, chown, link, mkdir, mkdtemp, open, rm } from "node:fs/promises";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { EnvdClient } from "../../guest/envd-client.ts";
import { signalProcess } from "../../host/process.ts";
import type { VmId } from "../../ids.ts";
import { Qcow2RootDisks } from "../../root-disk/qcow2.ts";
import { memoryFilePath } from "../memory/manifest.ts";
import { openQemuDriver } from "../qemu/qemu-driver.ts";
import type { VmmTestBed } from "../vmm.contract.ts";
import type { MemoryLayer, Vm, VmmDriver, VmPlace, VmShape } from "../vmm.ts";
import type { TestImage } from "./guest-image.ts";

/** No VMM of a product has it. */
const UID_BASE = 3_900_000;
const MAC = "52:54:00:12:34:56";
const ENVD_PORT = 49_983;
const TOKEN = "test-token";
const ANSWER_MS = 60_000;

async function freePort(): Promise<number> {
  const server = createServer();
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  const address = server.address();
  await new Promise((resolve) => server.close(resolve));
  if (address === null || typeof address === "string") throw new Error("no port");
  return address.port;
}

export interface QemuTestBed extends VmmTestBed {
  /** Runs a command in the guest, as root. The answer is its stdout; a failure is thrown. */
  exec(vm: Vm, command: string): Promise<string>;
}

export async function openQemuTestBed(
  image: TestImage,
  options: { shape?: VmShape } = {},
): Promise<QemuTestBed> {
  const dir = await mkdtemp(join(process.env["ROOKERY_TEST_DIR"] ?? tmpdir(), "rk-vmm-"));
  await chmod(dir, 0o711);
  const asRoot = process.getuid?.() === 0;
  const rootDisk = new Qcow2RootDisks();
  const openDriver = (): VmmDriver => openQemuDriver({ dataDir: join(dir, "data") });
  let driver = openDriver();
  const envd = new EnvdClient();
  const places = new Map<string, VmPlace>();
  let lastPlace = 0;

  // The image may lie on another file system than our disks, which need hard links.
  const diskPath = join(dir, "root.raw");
  await link(image.rootDisk.path, diskPath).catch(async () => {
    const { run } = await import("../../host/run.ts");
    await run(["cp", "--sparse=always", image.rootDisk.path, diskPath], { timeoutMs: 120_000 });
    await chmod(diskPath, 0o444);
  });

  const targetOf = (vm: Vm) => {
    const { nic } = vm.place;
    const port = nic.kind === "user" ? nic.forwards[0]?.hostPort : undefined;
    if (port === undefined) throw new Error("a test's VM has a user-mode network");
    return { host: "127.0.0.1", port, accessToken: TOKEN };
  };

  const bed: QemuTestBed = {
    get vmm() {
      return driver;
    },
    rootDisk,
    shape: options.shape ?? { vcpus: 1, memoryMb: 512 },
    boot: {
      ...image.boot,
      cmdline: `${image.boot.cmdline} rookery.address=10.0.2.15/24 rookery.gateway=10.0.2.2`,
    },
    image: {
      chain: [{ kind: "image", path: diskPath, format: "raw" }],
      sizeBytes: image.rootDisk.sizeBytes,
    },
    dir,

    async restartDriver() {
      await driver.close();
      driver = openDriver();
      return driver;
    },

    async makePlace() {
      lastPlace += 1;
      const uid = asRoot ? UID_BASE + lastPlace : 0;
      const at = join(dir, `vm${lastPlace}`);
      const place: VmPlace = {
        vmId: `vm${lastPlace}` as VmId,
        uid,
        runDir: join(at, "run"),
        socketDir: join(at, "s"),
        logDir: join(at, "log"),
        cgroupProcs: [],
        nic: { kind: "user", mac: MAC, forwards: [{ hostPort: await freePort(), guestPort: ENVD_PORT }] },
      };
      for (const each of [place.runDir, place.socketDir, place.logDir])
        await mkdir(each, { recursive: true });
      await chown(place.runDir, uid, uid);
      places.set(place.vmId, place);
      return place;
    },

    async removePlace(place) {
      await rm(join(place.runDir, ".."), { recursive: true, force: true });
      places.delete(place.vmId);
    },

    async killFromOutside(vm) {
      await signalProcess({ pid: vm.record.pid, startTime: vm.record.startTime }, "SIGKILL");
    },

    async damage(layer: MemoryLayer) {
      await using file = await open(memoryFilePath(layer.dir, "pages"), "r+");
      const byte = Buffer.alloc(1);
      await file.read(byte, 0, 1, 100);
      byte[0] = (byte[0] ?? 0) ^ 1;
      await file.write(byte, 0, 1, 100);
    },

    async exec(vm, command) {
      const result = await envd.exec(
        targetOf(vm),
        {
          cmd: "/bin/sh",
          args: ["-c", command],
          shell: false,
          env: {},
          user: "root",
          stdin: new Uint8Array(),
          timeoutMs: ANSWER_MS,
        },
        { maxOutputBytes: 1 << 20 },
        AbortSignal.timeout(ANSWER_MS),
      );
      const output = Buffer.from(result.stdout).toString("utf8");
      if (result.exitCode !== 0) {
        throw new Error(
          `${command}: ${result.exitCode}\n${output}${Buffer.from(result.stderr).toString("utf8")}`,
        );
      }
      return output;
    },

    guest: {
      async ready(vm) {
        const address = targetOf(vm);
        const ended = new AbortController();
        void vm.exited.then((exit) => ended.abort(new Error(`the VM ended: ${exit.reason} ${exit.message}`)));
        const limit = AbortSignal.any([AbortSignal.timeout(ANSWER_MS), ended.signal]);
        await envd.waitHealthy(address, limit);
        await envd.init(
          address,
          {
            restoreId: randomBytes(16).toString("hex"),
            sandboxId: "test",
            hostname: "test",
            machineId: randomBytes(16).toString("hex"),
            timestamp: new Date().toISOString(),
            entropy: randomBytes(64).toString("base64"),
            envVars: {},
            accessToken: TOKEN,
            defaultUser: "user",
            growRootFs: false,
          },
          limit,
        );
      },
      async remember(vm, text) {
        await bed.exec(vm, `echo '${text}' > /dev/shm/remembered`);
      },
      async recall(vm) {
        return (await bed.exec(vm, "cat /dev/shm/remembered")).trim();
      },
      async ticks(vm) {
        const script =
          "i=0; while :; do i=$((i+1)); echo $i > /dev/shm/t.new; mv /dev/shm/t.new /dev/shm/t; sleep 0.05; done";
        await bed.exec(vm, `[ -e /dev/shm/t ] || (setsid sh -c '${script}' </dev/null >/dev/null 2>&1 &)`);
        return Number(await bed.exec(vm, "until [ -e /dev/shm/t ]; do sleep 0.01; done; cat /dev/shm/t"));
      },
      async crash(vm) {
        // Answered or not: the guest is gone meanwhile.
        await bed
          .exec(vm, "echo 1 > /proc/sys/kernel/sysrq; echo c > /proc/sysrq-trigger")
          .catch(() => undefined);
      },
      async shutDown(vm) {
        await bed
          .exec(vm, "echo 1 > /proc/sys/kernel/sysrq; echo o > /proc/sysrq-trigger")
          .catch(() => undefined);
      },
    },

    async [Symbol.asyncDispose]() {
      await envd.close();
      await driver.close();
      await rm(dir, { recursive: true, force: true });
    },
  };
  return bed;
}
