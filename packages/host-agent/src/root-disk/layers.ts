/**
 * Frozen disk layers on disk: `LAYERS/ID/disk.qcow2`, and beside it the names
 * of what it stands on, as its header has them.
 */
import { readdir } from "node:fs/promises";
import { join } from "node:path";
import { removeTree } from "../host/atomic-file.ts";
import { isErrno } from "../host/errno.ts";
import type { LayerId } from "../ids.ts";

const LAYER_ID = /^ly[a-z0-9]{16}$/;

export function isLayerId(text: string): text is LayerId {
  return LAYER_ID.test(text);
}

/** Where a layer is made before it gets its name. */
export function unfinishedLayerDir(layersDir: string, id: LayerId): string {
  return join(layersDir, `.${id}.tmp`);
}

/**
 * Removes layers that no manifest refers to, and what a crash left of making
 * one. `referenced` has the layers of all manifests and of all operations under
 * way. Gives back what it removed; what bears no name of ours stays.
 */
export async function sweepLayers(layersDir: string, referenced: ReadonlySet<LayerId>): Promise<LayerId[]> {
  const names = await readdir(layersDir).catch((cause: unknown) => {
    if (isErrno(cause, "ENOENT")) return [];
    throw cause;
  });
  const removed: LayerId[] = [];
  for (const name of names) {
    const id = /^\.(.*)\.tmp$/.exec(name)?.[1] ?? name;
    if (!isLayerId(id) || referenced.has(id)) continue;
    await removeTree(join(layersDir, name));
    removed.push(id);
  }
  return removed;
}
