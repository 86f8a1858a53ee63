/**
 * What the journal keeps: one record per sandbox, VM and snapshot.
 *
 * A record names every host resource that its owner has or is about to have,
 * before the first of them is made. Records are versioned: an agent refuses
 * one that a newer agent wrote, rather than guess.
 */
import { ERRORS, type ErrorCode } from "@rookery/protocol/errors";
import { z } from "zod";
import type { NetworkLease } from "../guest-network/guest-network.ts";
import type { LayerId, SandboxId, Slot, SnapshotId, VmId, WarmKey } from "../ids.ts";
import type { DiskLayer } from "../root-disk/root-disk.ts";
import type { VmRecord } from "../vmm/vmm.ts";

/** A branded id: it stands in paths, so its form is checked even in files of our own. */
function id<T extends string>(form: RegExp) {
  return z
    .string()
    .regex(form)
    .transform((text) => text as T);
}

export const sandboxIdSchema = id<SandboxId>(/^sb[a-z0-9]{18}$/);
export const vmIdSchema = id<VmId>(/^vm[a-z0-9]{16}$/);
export const layerIdSchema = id<LayerId>(/^ly[a-z0-9]{16}$/);
export const snapshotIdSchema = id<SnapshotId>(/^[a-z0-9][a-z0-9-]{0,63}$/);
const warmKeySchema = id<WarmKey>(/^[0-9a-f]{64}$/);
const slotSchema = z
  .number()
  .int()
  .nonnegative()
  .transform((slot) => slot as Slot);
const errorCodeSchema = z.enum(Object.keys(ERRORS) as [ErrorCode, ...ErrorCode[]]);
const generationSchema = z
  .string()
  .regex(/^-?\d{1,19}$/)
  .transform(BigInt);
export const machineIdSchema = z.string().regex(/^[0-9a-f]{32}$/);
const epochMs = z.number().int().nonnegative();

export const lifetimeSchema = z.object({
  timeoutSec: z.number().int().nonnegative(),
  onTimeout: z.enum(["pause", "destroy"]),
  mode: z.enum(["idle", "absolute"]),
});

const specSchema = z.object({
  id: sandboxIdSchema,
  teamId: z.string(),
  source: z.discriminatedUnion("kind", [
    z.object({ kind: z.literal("image"), name: z.string() }),
    z.object({ kind: z.literal("snapshot"), snapshotId: snapshotIdSchema }),
  ]),
  vcpus: z.number().int().positive(),
  memoryMb: z.number().int().positive(),
  diskMb: z.number().int().positive(),
  lifetime: lifetimeSchema,
  env: z.record(z.string(), z.string()),
  envdAccessToken: z.string(),
});

export const operationKinds = ["create", "destroy", "pause", "resume", "snapshot"] as const;
export type OperationKind = (typeof operationKinds)[number];

const outcomeSchema = z.object({
  kind: z.enum(operationKinds),
  generation: generationSchema,
  /** Absent while it is under way, and when it succeeded. */
  error: z.object({ code: errorCodeSchema, message: z.string() }).optional(),
});
/** The last command, so that its repetition is answered and not done again. */
export type Outcome = z.output<typeof outcomeSchema>;

export const sandboxRecordSchema = z.object({
  version: z.literal(1),
  spec: specSchema,
  /** Of /etc/machine-id: the same through all pauses. */
  machineId: machineIdSchema,
  createdAtMs: epochMs,
  /** Boot of this host in which the record was written: VMs do not survive it. */
  bootId: z.string(),
  generation: generationSchema,
  last: outcomeSchema.optional(),
  phase: z.enum(["starting", "running", "pausing", "paused", "resuming", "stopping", "failed"]),
  /** Warm image that its memory is a difference from. */
  warmKey: warmKeySchema.optional(),
  /** Its VM; while paused or failed: one that is still to be released. */
  vm: z.object({ vmId: vmIdSchema, uid: z.number().int(), runDir: z.string() }).optional(),
  /** Memory layer, by the name of its directory in the sandbox's own. */
  layer: z
    .object({
      name: z.string().regex(/^layer-[a-z0-9-]+$/),
      pageBytes: z.number(),
      allocatedBytes: z.number(),
    })
    .optional(),
  /**
   * Set, durably, before a guest is thawed onto this disk: from then on the
   * layer fits the disk only if the disk still looks as it did then.
   */
  thawing: z.object({ diskMark: z.string() }).optional(),
  /** A snapshot being made; `switching` is set before the VMM may change tops. */
  fork: z.object({ snapshotId: snapshotIdSchema, layerId: layerIdSchema, switching: z.boolean() }).optional(),
  /** There was no room for a pause: its guest is stopped in memory (sandbox-manager/holding.ts). */
  frozen: z.object({ sinceMs: epochMs }).optional(),
  /** The control plane has no row of it: its guest is stopped in memory, if it ran. */
  stranger: z.object({ sinceMs: epochMs }).optional(),
  startedAtMs: epochMs,
  /** Absolute lifetimes count from here. */
  lifetimeSinceMs: epochMs,
  exit: z.object({ code: z.string(), message: z.string() }).optional(),
  /** Not yet in the event log. */
  pendingEvent: z
    .object({
      kind: z.enum(["paused", "stopped", "failed", "resumed"]),
      reason: z.string(),
      message: z.string(),
      occurredAtUnixMs: epochMs,
    })
    .optional(),
});
export type SandboxRecord = z.output<typeof sandboxRecordSchema>;

const nicSchema = z.discriminatedUnion("kind", [
  z.object({ kind: z.literal("tap"), netnsPath: z.string(), tapName: z.string(), mac: z.string() }),
  z.object({
    kind: z.literal("user"),
    mac: z.string(),
    forwards: z.array(z.object({ hostPort: z.number().int(), guestPort: z.number().int() })),
  }),
  z.object({ kind: z.literal("simulated"), mac: z.string(), port: z.number().int() }),
]);
const leaseSchema: z.ZodType<NetworkLease> = z.object({
  driver: z.enum(["netns", "user", "simulated"]),
  slot: slotSchema,
  uid: z.number().int(),
  nic: nicSchema,
  envdHost: z.string(),
  envdPort: z.number().int(),
});
const processSchema: z.ZodType<VmRecord> = z.object({
  kind: z.enum(["qemu", "firecracker", "simulated"]),
  vmId: vmIdSchema,
  pid: z.number().int(),
  startTime: z.string(),
  driver: z.record(z.string(), z.unknown()),
});

export const vmPlaceRecordSchema = z.object({
  version: z.literal(1),
  vmId: vmIdSchema,
  slot: slotSchema,
  uid: z.number().int().nonnegative(),
  runDir: z.string(),
  logDir: z.string(),
  socketDir: z.string(),
  cgroup: z.string(),
  lease: leaseSchema,
  bootId: z.string(),
  /** Set once its VMM has been spawned. */
  process: processSchema.optional(),
});
export type VmPlaceRecord = z.output<typeof vmPlaceRecordSchema>;

const diskLayerSchema: z.ZodType<DiskLayer> = z.discriminatedUnion("kind", [
  z.object({ kind: z.literal("image"), path: z.string(), format: z.literal("raw") }),
  z.object({ kind: z.literal("layer"), id: layerIdSchema, path: z.string(), format: z.literal("qcow2") }),
]);

export const snapshotRecordSchema = z.object({
  version: z.literal(1),
  id: snapshotIdSchema,
  teamId: z.string(),
  sourceSandboxId: sandboxIdSchema,
  /** Of its source: for the same sandbox on another host. Absent in records of older agents. */
  machineId: machineIdSchema.optional(),
  createdAtMs: epochMs,
  warmKey: warmKeySchema,
  vcpus: z.number().int().positive(),
  memoryMb: z.number().int().positive(),
  diskMb: z.number().int().positive(),
  chain: z.array(diskLayerSchema).min(1),
  layer: z.object({ pageBytes: z.number(), allocatedBytes: z.number() }),
  sizeBytes: z.number().int().nonnegative(),
  /** What a host must have to load it: see sandbox-manager/compat.ts. Absent in records of older agents. */
  compat: z.string().optional(),
  /** Object store that it lies in, as a whole; absent: not sent yet. */
  storeId: z.string().optional(),
  /** It came from the object store, so this host's copy may go; `bytes` is what that would free. */
  imported: z.object({ atMs: epochMs, bytes: z.number().int().nonnegative() }).optional(),
});
export type SnapshotRecord = z.output<typeof snapshotRecordSchema>;

/** All that is left of a destroyed sandbox. */
export const tombstoneSchema = z.object({
  id: sandboxIdSchema,
  generation: generationSchema,
  last: outcomeSchema.optional(),
  destroyedAtMs: epochMs,
});
export type Tombstone = z.output<typeof tombstoneSchema>;

/** JSON as the schemas read it back: bigints as decimal text. */
export function toJson(value: unknown): string {
  return JSON.stringify(value, (_key, item: unknown) => (typeof item === "bigint" ? item.toString() : item));
}
