/**
 * Changing a VM's disk while it is stopped: exchange of the whole chain (before
 * its guest has run), a new top over the present one, and growth.
 */
import type { DiskAttachment } from "../../root-disk/root-disk.ts";
import { DISK_DEVICE, DISK_NODE } from "./arguments.ts";
import { chainNodes, diskNode, newestGeneration, nodeNamesOf, topNodeName } from "./block-graph.ts";
import { runDirAsSeen } from "./launcher.ts";
import type { QemuProcess } from "./qemu-process.ts";

async function nodeNames(qemu: QemuProcess, signal: AbortSignal): Promise<string[]> {
  const nodes = await qemu.command("query-named-block-nodes", { flat: true }, { signal });
  return nodes.flatMap((node) => node["node-name"] ?? []);
}

function presentGeneration(names: readonly string[]): number {
  const generation = newestGeneration(names);
  if (generation === undefined) throw new Error("the VM has no disk");
  return generation;
}

/** Opens a chain beside the present one. All of it, or an error and none of it. */
async function addChain(
  qemu: QemuProcess,
  disk: DiskAttachment,
  generation: number,
  signal: AbortSignal,
): Promise<void> {
  const added: string[] = [];
  try {
    for (const node of chainNodes(disk, generation, runDirAsSeen(qemu.place))) {
      await qemu.command("blockdev-add", node, { signal });
      added.unshift(node["node-name"]);
    }
  } catch (cause) {
    // Not under the signal: after an abort too, what stays would pass for the present top.
    for (const name of added) await qemu.command("blockdev-del", { "node-name": name }, {});
    throw cause;
  }
}

/** The device gets `disk` instead of what it has; the old chain is closed. */
export async function exchangeDisk(
  qemu: QemuProcess,
  disk: DiskAttachment,
  signal: AbortSignal,
): Promise<void> {
  const names = await nodeNames(qemu, signal);
  const old = presentGeneration(names);
  await addChain(qemu, disk, old + 1, signal);
  await qemu.command("blockdev-reopen", { options: [diskNode(old + 1)] }, { signal });
  for (const name of nodeNamesOf(old, names)) {
    await qemu.command("blockdev-del", { "node-name": name }, { signal });
  }
}

/** The first of `disk`'s files becomes the top over the present one, which QEMU reopens read-only. */
export async function pushDiskTop(
  qemu: QemuProcess,
  disk: DiskAttachment,
  signal: AbortSignal,
): Promise<void> {
  if (disk.kind !== "file-chain") throw new Error("only a disk of files takes another top");
  const present = presentGeneration(await nodeNames(qemu, signal));
  // Without a backing node: the snapshot gives it one.
  await addChain(qemu, { ...disk, nodes: disk.nodes.slice(0, 1) }, present + 1, signal);
  await qemu.command(
    "blockdev-snapshot",
    { node: topNodeName(present), overlay: topNodeName(present + 1) },
    { signal },
  );
}

export async function growDisk(qemu: QemuProcess, bytes: number, signal: AbortSignal): Promise<void> {
  const devices = await qemu.command("query-block", {}, { signal });
  // `qdev` is the device's id, or its path where QEMU has made one up.
  const image = devices.find((device) => device.qdev?.endsWith(DISK_DEVICE))?.inserted?.image;
  if (image === undefined) throw new Error("the VM has no disk");
  if (image["virtual-size"] < bytes) {
    await qemu.command("block_resize", { "node-name": DISK_NODE, size: bytes }, { signal });
  }
}
