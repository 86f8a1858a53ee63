/**
 * `qemu-img` on a disk that a VMM had in its hands.
 *
 * Invariants: the tool is told every file of the chain and takes none from a
 * header; where the agent is root, it runs without its uid and capabilities in
 * a directory that holds this disk's files alone.
 */
import { chown, link, mkdir } from "node:fs/promises";
import { join } from "node:path";
import { removeTree } from "../host/atomic-file.ts";
import { run } from "../host/run.ts";
import { giveTo } from "./ownership.ts";
import type { DiskLayer } from "./root-disk.ts";

/** A flatten copies at most a disk's size; a tool that takes longer is stuck. */
const TOOL_TIMEOUT_MS = 30 * 60_000;
const TOP = "top";

/** Name of the chain's `index`-th file beside any file that stands on it; stored in headers as well. */
export function belowName(index: number): string {
  return `below-${index}`;
}

/**
 * Runs `qemu-img SUBCOMMAND --image-opts ARGS… THE-WHOLE-CHAIN AFTER…` on the
 * top `topFile`, in a work directory `workDir` that is made and removed.
 */
export async function runImageTool(
  target: { workDir: string; topFile: string; chain: readonly DiskLayer[]; toolUid: number },
  command: { subcommand: "resize" | "rebase"; args?: readonly string[]; after?: readonly string[] },
  signal: AbortSignal,
): Promise<void> {
  const { workDir, topFile, chain, toolUid } = target;
  await removeTree(workDir);
  try {
    await mkdir(workDir, { mode: 0o700 });
    await link(topFile, join(workDir, TOP));
    for (const [index, layer] of chain.entries()) await link(layer.path, join(workDir, belowName(index)));
    const isRoot = process.getuid?.() === 0;
    if (isRoot) {
      await giveTo(topFile, toolUid, 0o600);
      await chown(workDir, toolUid, toolUid);
    }
    const tool = [
      "qemu-img",
      command.subcommand,
      "--image-opts",
      ...(command.args ?? []),
      imageOptions(chain),
      ...(command.after ?? []),
    ] as const;
    await run(isRoot ? [...withoutPrivileges(toolUid), ...tool] : [...tool], {
      signal,
      timeoutMs: TOOL_TIMEOUT_MS,
      cwd: workDir,
    });
  } finally {
    await giveTo(topFile, 0, 0o600);
    await removeTree(workDir);
  }
}

/** The graph in full: `driver=qcow2,file.filename=top,backing.driver=…`. */
function imageOptions(chain: readonly DiskLayer[]): string {
  const files = [
    ...chain.map((layer, index) => ({ format: layer.format, name: belowName(index) })),
    { format: "qcow2", name: TOP },
  ].toReversed();
  return files
    .flatMap(({ format, name }, depth) => {
      const prefix = "backing.".repeat(depth);
      return [`${prefix}driver=${format}`, `${prefix}file.driver=file`, `${prefix}file.filename=${name}`];
    })
    .join(",");
}

function withoutPrivileges(uid: number): [string, ...string[]] {
  return [
    "setpriv",
    `--reuid=${uid}`,
    `--regid=${uid}`,
    "--clear-groups",
    "--no-new-privs",
    "--bounding-set=-all",
    "--inh-caps=-all",
    "--ambient-caps=-all",
    "--",
  ];
}
