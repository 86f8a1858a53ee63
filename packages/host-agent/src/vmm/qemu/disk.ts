/**
 * Changing a VM's disk while it is stopped: exchange of the whole chain (before
 * its guest has run), a new top over the present one, and growth.
 */
import type { DiskAttachment } from "../../root-disk/root-disk.ts";
import { DISK_DEVICE, DISK_NODE } from "./arguments.ts";
import { chainNodes, diskNode, newestGeneration, nodeNamesOf, topNodeName } from "./block-graph.ts";
import { runDirAsSeen } from "./launcher.ts";
import type { QemuProcess } from "./qemu-process.ts";
import type { QmpAnswer } from "./qmp-commands.ts";

/** `flat` leaves out what the backing nodes are, and how many. */
function namedNodes(
  qemu: QemuProcess,
  flat: boolean,
  signal: AbortSignal,
): Promise<QmpAnswer<"query-named-block-nodes">> {
  return qemu.command("query-named-block-nodes", { flat }, { signal });
}

async function nodeNames(qemu: QemuProcess, signal: AbortSignal): Promise<string[]> {
  return (await namedNodes(qemu, true, signal)).flatMap((node) => node["node-name"] ?? []);
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

/**
 * The first of `disk`'s files becomes the top over the present one, which QEMU
 * reopens read-only. Repeated after a crash at any line it does what is left to do.
 */
export async function pushDiskTop(
  qemu: QemuProcess,
  disk: DiskAttachment,
  signal: AbortSignal,
): Promise<void> {
  if (disk.kind !== "file-chain") throw new Error("only a disk of files takes another top");
  const nodes = await namedNodes(qemu, false, signal);
  const newest = presentGeneration(nodes.flatMap((node) => node["node-name"] ?? []));
  const nodeOf = (name: string) => nodes.find((node) => node["node-name"] === name);
  // The file's own node has its path; the format's node over it has a description of the whole graph.
  const file = nodeOf(`${topNodeName(newest)}-file`)?.file;
  const isAdded = file === `${runDirAsSeen(qemu.place)}/${disk.nodes[0]?.file}`;
  // Only the snapshot gives it a backing node.
  if (isAdded && (nodeOf(topNodeName(newest))?.backing_file_depth ?? 0) > 0) return;
  const present = isAdded ? newest - 1 : newest;
  if (!isAdded) {
    await addChain(qemu, { ...disk, nodes: disk.nodes.slice(0, 1) }, present + 1, signal);
  }
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
