/**
 * Kernel and initrd out of Debian's packages.
 *
 * Debian's cloud kernel has ext4 built in and virtio as modules, so the initrd
 * holds busybox, the few modules that reach disk and network, and our init.
 */
import { copyFile, mkdir, readFile, readdir, writeFile } from "node:fs/promises";
import { join } from "node:path";
import type { BuildContext } from "./build-context.ts";
import type { CpioEntry } from "./cpio.ts";
import { writeCpio } from "./cpio.ts";
import { INITRD_FILE, KERNEL_FILE } from "./guest-image.ts";

/**
 * In the order of loading. modules.dep is no help here: it is made when the
 * package is installed, which it never is.
 */
export const INITRD_MODULES: readonly string[] = [
  "drivers/virtio/virtio_ring", // virtio uses its symbols
  "drivers/virtio/virtio",
  "drivers/virtio/virtio_mmio",
  "drivers/block/virtio_blk",
  "net/core/failover",
  "drivers/net/net_failover",
  "drivers/net/virtio_net",
];

/** Writes `vmlinuz` and `initrd.img` into `targetDir` from the packages in `debsDir`. */
export async function makeKernelFiles(
  context: BuildContext,
  options: { debsDir: string; workDir: string; targetDir: string },
): Promise<void> {
  const { debsDir, workDir, targetDir } = options;
  const trees = { kernel: join(workDir, "kernel"), busybox: join(workDir, "busybox") };
  for (const name of await readdir(debsDir)) {
    const tree = name.startsWith("busybox") ? trees.busybox : trees.kernel;
    await mkdir(tree, { recursive: true });
    await context.run(["dpkg-deb", "--extract", join(debsDir, name), tree], { signal: context.signal });
  }
  const kernelNames = (await readdir(join(trees.kernel, "boot"))).filter((name) =>
    name.startsWith("vmlinuz-"),
  );
  const [kernelName] = kernelNames;
  if (kernelName === undefined || kernelNames.length !== 1) {
    throw new Error(`the kernel package holds ${kernelNames.length} kernels`);
  }
  await mkdir(targetDir, { recursive: true });
  await copyFile(join(trees.kernel, "boot", kernelName), join(targetDir, KERNEL_FILE));
  const release = kernelName.slice("vmlinuz-".length);
  const initrd = await makeInitrd({
    busybox: join(trees.busybox, "bin/busybox"),
    modulesDir: join(trees.kernel, "lib/modules", release, "kernel"),
    init: join(context.guestFilesDir, "initrd/init"),
  });
  await writeFile(join(targetDir, INITRD_FILE), initrd);
}

/** Not compressed: unpacking costs an emulated guest more than loading two megabytes. */
async function makeInitrd(files: { busybox: string; modulesDir: string; init: string }): Promise<Buffer> {
  const names = INITRD_MODULES.map((path) => `${path.slice(path.lastIndexOf("/") + 1)}.ko`);
  const modules: CpioEntry[] = [];
  for (const [index, path] of INITRD_MODULES.entries()) {
    modules.push({
      kind: "file",
      path: `modules/${names[index]}`,
      mode: 0o644,
      data: await readFile(join(files.modulesDir, `${path}.ko`)),
    });
  }
  return writeCpio([
    ...["bin", "dev", "modules", "proc", "root"].map((path): CpioEntry => ({
      kind: "directory",
      path,
      mode: 0o755,
    })),
    // The kernel opens it for init before init can mount /dev.
    { kind: "character-device", path: "dev/console", mode: 0o600, major: 5, minor: 1 },
    { kind: "file", path: "bin/busybox", mode: 0o755, data: await readFile(files.busybox) },
    { kind: "symlink", path: "bin/sh", target: "busybox" },
    { kind: "file", path: "modules/order", mode: 0o644, data: Buffer.from(`${names.join("\n")}\n`) },
    ...modules,
    { kind: "file", path: "init", mode: 0o755, data: await readFile(files.init) },
  ]);
}
