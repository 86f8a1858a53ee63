/** A template's name or id → what a sandbox of it is made from, and in which shape. */
import { RookeryError } from "@rookery/protocol/errors";
import { hostsOfSnapshot } from "../db/snapshot-copies.ts";
import { findSnapshot } from "../db/snapshots.ts";
import { findPlatformTemplate } from "../db/templates.ts";
import type { SnapshotPlaces } from "../hosts/scheduler.ts";
import type { SnapshotId, TeamId } from "../model/ids.ts";
import type { Deps } from "./deps.ts";

const VCPUS: readonly number[] = [1, 2, 4, 8];
const MEMORY_MB: readonly number[] = [256, 512, 1024, 2048, 4096, 8192, 16_384];
const MAX_DISK_MB = 65_536;

interface Shape {
  vcpus: number;
  memoryMb: number;
  diskMb: number;
}

export interface Origin extends Shape {
  name: string;
  /** Its memory was frozen in one shape, and not every host has or can load it. */
  snapshot?: SnapshotPlaces & { id: SnapshotId };
}

export async function resolveTemplate(
  { db }: Pick<Deps, "db">,
  teamId: TeamId,
  nameOrId: string,
): Promise<Origin> {
  const template = await findPlatformTemplate(db, nameOrId);
  if (template) return template;
  const snapshot = await findSnapshot(db, teamId, nameOrId);
  if (!snapshot) {
    throw new RookeryError("template_not_found", "There is no such template or snapshot.", {
      details: { field: "template" },
    });
  }
  const { id, name, vcpus, memoryMb, diskMb, compat, storeId } = snapshot;
  const hostIds = await hostsOfSnapshot(db, id);
  return { name, vcpus, memoryMb, diskMb, snapshot: { id, hostIds, compat, storeId } };
}

/** The shape asked for, if this origin can have it. */
export function chooseShape(origin: Origin, asked: Partial<Shape>): Shape {
  const shape = {
    vcpus: asked.vcpus ?? origin.vcpus,
    memoryMb: asked.memoryMb ?? origin.memoryMb,
    diskMb: asked.diskMb ?? origin.diskMb,
  };
  if (origin.snapshot) {
    const why = `is fixed by the snapshot ${origin.name}`;
    if (shape.vcpus !== origin.vcpus) throw unsupported("vcpus", `${why}: ${origin.vcpus}`);
    if (shape.memoryMb !== origin.memoryMb) throw unsupported("memory_mb", `${why}: ${origin.memoryMb}`);
  }
  if (!VCPUS.includes(shape.vcpus)) throw unsupported("vcpus", `must be one of ${VCPUS.join(", ")}`);
  if (!MEMORY_MB.includes(shape.memoryMb)) {
    throw unsupported("memory_mb", `must be one of ${MEMORY_MB.join(", ")}`);
  }
  if (shape.diskMb < origin.diskMb || shape.diskMb > MAX_DISK_MB) {
    throw unsupported("disk_mb", `must be ${origin.diskMb} (the template's) to ${MAX_DISK_MB}`);
  }
  return shape;
}

function unsupported(field: string, reason: string): RookeryError {
  return new RookeryError("unsupported_shape", `${field} ${reason}.`, { details: { field, reason } });
}
