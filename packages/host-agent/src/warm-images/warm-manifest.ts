/**
 * A warm image on disk: DATA/warm/KEY/
 *
 *   manifest.json            this
 *   memory.*, device.state   the VMM driver's memory base (vmm/memory/manifest.ts)
 *   disk/LAYERID/            the disk layer over the guest image's own disk
 *
 * Invariant: a directory that bears a key was made beside it and renamed when it
 * was whole and durable; nothing in it changes after that.
 */
import { join } from "node:path";
import { z } from "zod";
import { readJson } from "../host/atomic-file.ts";
import type { LayerId, WarmKey } from "../ids.ts";
import type { DiskLayer } from "../root-disk/root-disk.ts";
import type { WarmImage } from "../sandbox-manager/warm-images.ts";

const sha256 = z.string().regex(/^[0-9a-f]{64}$/);

export const warmManifestSchema = z.object({
  version: z.literal(1),
  key: sha256,
  image: z.object({ name: z.string(), hash: sha256, diskPath: z.string() }),
  shape: z.object({ vcpus: z.number().int().positive(), memoryMb: z.number().int().positive() }),
  memory: z.object({ sha256, deviceStateSha256: sha256, fingerprint: z.string() }),
  disk: z.object({
    layerId: z
      .string()
      .regex(/^ly[a-z0-9]{16}$/)
      .transform((text) => text as LayerId),
    /** Below the warm image's directory. */
    file: z.string().regex(/^disk\/[A-Za-z0-9/._-]+$/),
    sizeBytes: z.number().int().positive(),
  }),
  allocatedBytes: z.number().int().nonnegative(),
  builtAt: z.iso.datetime(),
});
export type WarmManifest = z.output<typeof warmManifestSchema>;

export const WARM_MANIFEST = "manifest.json";

export interface StoredWarmImage extends WarmImage {
  dir: string;
  image: { name: string; hash: string };
  allocatedBytes: number;
  builtAtMs: number;
}

export function storedWarmImage(dir: string, manifest: WarmManifest): StoredWarmImage {
  const layer: DiskLayer = {
    kind: "layer",
    id: manifest.disk.layerId,
    path: join(dir, manifest.disk.file),
    format: "qcow2",
  };
  return {
    key: manifest.key as WarmKey,
    dir,
    base: {
      dir,
      shape: manifest.shape,
      memorySha256: manifest.memory.sha256,
      deviceStateSha256: manifest.memory.deviceStateSha256,
      fingerprint: manifest.memory.fingerprint,
    },
    diskChain: [{ kind: "image", path: manifest.image.diskPath, format: "raw" }, layer],
    diskSizeBytes: manifest.disk.sizeBytes,
    shape: manifest.shape,
    image: { name: manifest.image.name, hash: manifest.image.hash },
    allocatedBytes: manifest.allocatedBytes,
    builtAtMs: Date.parse(manifest.builtAt),
  };
}

/** Throws ENOENT when there is none. */
export async function readWarmImage(dir: string): Promise<StoredWarmImage> {
  return storedWarmImage(dir, await readJson(join(dir, WARM_MANIFEST), warmManifestSchema));
}
