/** `disk.json`: what a disk directory holds. It is replaced as a whole, last of all that changes a disk. */
import { join } from "node:path";
import { z } from "zod";
import { readJson, writeFileAtomic } from "../host/atomic-file.ts";
import { isLayerId } from "./layers.ts";
import type { RootDisk } from "./root-disk.ts";

const path = z.string().startsWith("/");
const layerId = z.string().refine(isLayerId, "is not a layer id");

const schema = z.strictObject({
  version: z.literal(1),
  driver: z.enum(["qcow2", "device-mapper", "simulated"]),
  chain: z
    .array(
      z.discriminatedUnion("kind", [
        z.strictObject({ kind: z.literal("image"), path, format: z.literal("raw") }),
        z.strictObject({ kind: z.literal("layer"), id: layerId, path, format: z.literal("qcow2") }),
      ]),
    )
    .min(1)
    .max(256),
  sizeBytes: z.int().positive(),
});

export function diskManifestPath(dir: string): string {
  return join(dir, "disk.json");
}

/** The directory is where the manifest is found: it may have been renamed since. */
export async function readDiskManifest(dir: string, driver: RootDisk["driver"]): Promise<RootDisk> {
  const manifest = await readJson(diskManifestPath(dir), schema);
  if (manifest.driver !== driver) {
    throw new Error(`${dir}: the disk was made by the driver ${manifest.driver}, not ${driver}`);
  }
  return { driver, dir, chain: manifest.chain, sizeBytes: manifest.sizeBytes };
}

export async function writeDiskManifest(disk: RootDisk, options: { sync: boolean }): Promise<void> {
  const { driver, chain, sizeBytes } = disk;
  const manifest: z.input<typeof schema> = { version: 1, driver, chain: [...chain], sizeBytes };
  await writeFileAtomic(diskManifestPath(disk.dir), `${JSON.stringify(manifest)}\n`, options);
}
