/**
 * A snapshot in the object store: `snapshots/ID.json`, written last, names all
 * that it consists of by content. Hosts write these, so they are read with care.
 */
import { createHash } from "node:crypto";
import { z } from "zod";
import type { LayerId, WarmKey } from "../ids.ts";
import { machineIdSchema, sandboxIdSchema, snapshotIdSchema } from "../journal/records.ts";

const sha256 = z.string().regex(/^[0-9a-f]{64}$/);
/** Larger than any disk or memory of ours; below what a number holds exactly. */
const MAX_BYTES = 2 ** 44;
const bytes = z.number().int().nonnegative().max(MAX_BYTES);
const content = z.object({ sha256, bytes, dataBytes: bytes });
/** They stand in paths. */
const fileName = z.string().regex(/^[a-z][a-z0-9.-]{0,63}$/);
const files = z
  .record(fileName, content)
  .refine((all) => Object.keys(all).length <= 16, "has more files than any memory");
const count = z.number().int().positive().max(1_000_000_000);

export const storedSnapshotSchema = z.object({
  version: z.literal(1),
  id: snapshotIdSchema,
  teamId: z.string().min(1).max(200),
  sourceSandboxId: sandboxIdSchema,
  machineId: machineIdSchema.optional(),
  createdAtMs: z.number().int().nonnegative(),
  compat: z.string().regex(/^[0-9a-f]{64}(-tsc\d{1,12})?$/),
  vcpus: count,
  memoryMb: count,
  diskMb: count,
  sizeBytes: bytes,
  image: z.object({ name: z.string().max(200), hash: sha256, disk: content }),
  /** What its memory is a difference from, and the disk that this memory knows. */
  warm: z.object({
    memory: z.object({ sha256, deviceStateSha256: sha256, fingerprint: z.string().max(200) }),
    files,
    /** Above the image, bottom first. */
    layers: z.array(content).max(1),
    diskSizeBytes: bytes.min(1),
  }),
  memory: z.object({ files, pageBytes: bytes, allocatedBytes: bytes }),
  /** The disk: above the image, bottom first. */
  layers: z.array(content).max(255),
});
export type StoredSnapshot = z.output<typeof storedSnapshotSchema>;
export type Content = z.output<typeof content>;

export const SNAPSHOT_KEY = /^snapshots\/[a-z0-9-]+\.json$/;
export const snapshotKey = (id: string): string => `snapshots/${id}.json`;
export const MAX_MANIFEST_BYTES = 1 << 20;

/** All contents of a snapshot, each once. */
export function contentsOf({ image, warm, memory, layers }: StoredSnapshot): Content[] {
  const all = [
    image.disk,
    ...warm.layers,
    ...Object.values(warm.files),
    ...layers,
    ...Object.values(memory.files),
  ];
  return [...new Map(all.map((one) => [one.sha256, one])).values()];
}

/**
 * Names of a chain's layers on every host that fetches it, bottom first: from
 * all that a layer stands on, so that two of one name are the same, whoever
 * made them.
 */
export function layerIdsOfChain(image: Content, layers: readonly Content[]): LayerId[] {
  return layers.map((_, index) => {
    const below = [image, ...layers.slice(0, index + 1)].map((one) => one.sha256);
    const digest = createHash("sha256").update(JSON.stringify(below)).digest("hex");
    const text = BigInt(`0x${digest}`).toString(36).padStart(50, "0");
    return `ly${text.slice(-16)}` as LayerId;
  });
}

/** Of a fetched warm image: no host builds one of this key, since each boots its own memory. */
export function fetchedWarmKey({ image, warm, vcpus, memoryMb }: StoredSnapshot): WarmKey {
  const parts = [
    "fetched",
    image.disk.sha256,
    warm.layers.map((one) => one.sha256),
    Object.entries(warm.files)
      .map(([name, one]) => `${name} ${one.sha256}`)
      .toSorted((a, b) => (a < b ? -1 : 1)),
    warm.memory.sha256,
    warm.memory.deviceStateSha256,
    warm.memory.fingerprint,
    warm.diskSizeBytes,
    vcpus,
    memoryMb,
  ];
  return createHash("sha256").update(JSON.stringify(parts)).digest("hex") as WarmKey;
}
