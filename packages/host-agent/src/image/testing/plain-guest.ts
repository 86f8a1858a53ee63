/**
 * A guest started by hand, by plain QEMU: the proof that an image boots, with
 * nothing of the VMM driver in between.
 */
import { spawn } from "node:child_process";
import { once } from "node:events";
import { mkdtemp, readFile } from "node:fs/promises";
import { createServer } from "node:net";
import type { AddressInfo } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { removeTree } from "../../host/atomic-file.ts";
import { run } from "../../host/run.ts";
import { measureTscKhz } from "../../vmm/tsc.ts";
import { guestNetworkArgs } from "../cmdline.ts";
import type { GuestImage } from "../guest-image.ts";

/** QEMU's user-mode network (qemu(1), -netdev user). */
const ADDRESSING = { addressCidr: "10.0.2.15/24", gateway: "10.0.2.2", nameservers: ["10.0.2.3"] };
const ENVD_PORT = 49_983;

export interface PlainGuest extends AsyncDisposable {
  envd: { host: string; port: number };
  /** What the guest wrote to its console. */
  console(): Promise<string>;
  /** Resolves when QEMU has ended. */
  exited: Promise<unknown>;
}

/** Boots `image` with a disk of its own on top. */
export async function bootPlainGuest(image: GuestImage, signal: AbortSignal): Promise<PlainGuest> {
  await using held = new AsyncDisposableStack();
  const dir = await mkdtemp(join(tmpdir(), "rookery-boot-"));
  held.defer(() => removeTree(dir));
  const disk = join(dir, "disk.qcow2");
  const consoleFile = join(dir, "console");
  await run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", image.rootDisk.path, disk], {
    signal,
  });
  const port = await freePort();
  const cmdline = [
    image.cmdline,
    guestNetworkArgs(ADDRESSING),
    "console=ttyS0",
    `tsc_early_khz=${await measureTscKhz(signal)}`,
    "tsc=reliable",
  ].join(" ");
  // prettier-ignore
  const qemu = spawn("qemu-system-x86_64", [
    "-M", "microvm,pit=on,pic=on,rtc=on,acpi=on",
    "-accel", "tcg,thread=multi",
    "-cpu", "max",
    "-nodefaults", "-no-user-config", "-no-reboot",
    "-m", "512M", "-smp", "1", "-display", "none",
    "-kernel", image.kernel, "-initrd", image.initrd, "-append", cmdline,
    "-serial", `file:${consoleFile}`,
    "-blockdev", `driver=qcow2,node-name=d0,file.driver=file,file.filename=${disk}`,
    "-device", "virtio-blk-device,drive=d0",
    "-netdev", `user,id=n0,restrict=on,hostfwd=tcp:127.0.0.1:${port}-:${ENVD_PORT}`,
    "-device", "virtio-net-device,netdev=n0",
  ], { stdio: ["ignore", "inherit", "inherit"] });
  const exited = once(qemu, "exit");
  held.defer(async () => {
    qemu.kill("SIGKILL");
    await exited;
  });
  const owned = held.move();
  return {
    envd: { host: "127.0.0.1", port },
    console: () => readFile(consoleFile, "utf8"),
    exited,
    [Symbol.asyncDispose]: () => owned.disposeAsync(),
  };
}

async function freePort(): Promise<number> {
  const server = createServer().listen(0, "127.0.0.1");
  await once(server, "listening");
  // oxlint-disable-next-line typescript/no-unsafe-type-assertion -- a TCP server has no other kind of address
  const { port } = server.address() as AddressInfo;
  server.close();
  await once(server, "close");
  return port;
}
