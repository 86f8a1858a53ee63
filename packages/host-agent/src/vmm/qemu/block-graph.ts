/**
 * A VM's disk as QEMU's block nodes.
 *
 * The virtio device holds one node for life, DISK_NODE: a raw filter whose
 * child is the top of a chain. Exchanging the disk means giving the filter
 * another child. Each attached chain has a generation: its nodes are named
 * `t<generation>`, `b<generation>-<depth>` (and `-file` for their files), so that
 * after an agent's restart the names alone tell which top is the present one.
 */
import type { DiskAttachment } from "../../root-disk/root-disk.ts";
import { DISK_NODE } from "./arguments.ts";
import type { BlockNode } from "./qmp-commands.ts";

/** Longer than any chain that a root disk driver leaves unflattened. */
const MAX_CHAIN = 64;

const TOP_NAME = /^t(\d{1,9})$/;

export function topNodeName(generation: number): string {
  return `t${generation}`;
}

/** The newest generation among node names; undefined when there is none. */
export function newestGeneration(names: readonly (string | undefined)[]): number | undefined {
  const generations = names.flatMap((name) => {
    const match = name === undefined ? null : TOP_NAME.exec(name);
    return match === null ? [] : [Number(match[1])];
  });
  return generations.length === 0 ? undefined : Math.max(...generations);
}

/** The nodes of a chain, bottom first; the last one is the top. `directory` is where the VMM sees its run directory. */
export function chainNodes(disk: DiskAttachment, generation: number, directory: string): BlockNode[] {
  const top = topNodeName(generation);
  if (disk.kind === "block-device") {
    return [
      { driver: "host_device", "node-name": `${top}-file`, filename: disk.path },
      { driver: "raw", "node-name": top, file: `${top}-file` },
    ];
  }
  if (disk.nodes.length === 0 || disk.nodes.length > MAX_CHAIN) {
    throw new RangeError(`a chain of ${disk.nodes.length} files`);
  }
  const names = disk.nodes.map((_, depth) => (depth === 0 ? top : `b${generation}-${depth}`));
  return disk.nodes
    .flatMap((node, depth): BlockNode[] => {
      if (!/^[A-Za-z0-9._-]+$/.test(node.file)) throw new RangeError("a disk file must be a plain name");
      const name = `${names[depth]}`;
      return [
        {
          driver: node.format,
          "node-name": name,
          file: `${name}-file`,
          "read-only": node.readOnly,
          ...(node.readOnly ? {} : { discard: "unmap" as const }),
          ...(node.format === "qcow2" ? { backing: names[depth + 1] ?? null } : {}),
        },
        {
          driver: "file",
          "node-name": `${name}-file`,
          filename: `${directory}/${node.file}`,
          "read-only": node.readOnly,
          ...(node.readOnly ? {} : { discard: "unmap" as const }),
        },
      ];
    })
    .toReversed();
}

/** The device's own node over the top of a generation. */
export function diskNode(generation: number): BlockNode {
  return { driver: "raw", "node-name": DISK_NODE, file: topNodeName(generation), discard: "unmap" };
}

/** Which of `names` belong to a generation, in the order in which they can be closed. */
export function nodeNamesOf(generation: number, names: readonly string[]): string[] {
  const top = topNodeName(generation);
  const depthOf = (name: string): number | undefined => {
    const node = name.endsWith("-file") ? name.slice(0, -"-file".length) : name;
    if (node === top) return 0;
    return node.startsWith(`b${generation}-`) ? Number(node.slice(`b${generation}-`.length)) : undefined;
  };
  return names
    .flatMap((name) => {
      const depth = depthOf(name);
      return depth === undefined ? [] : [{ name, order: depth * 2 + (name.endsWith("-file") ? 1 : 0) }];
    })
    .toSorted((a, b) => a.order - b.order)
    .map(({ name }) => name);
}
