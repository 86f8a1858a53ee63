/** Snapshots and templates, as the API speaks of them. */
import { z } from "zod";
import { pageOf, text, Time } from "./common.ts";

const SNAPSHOT_NAME = /^[a-z0-9][a-z0-9._-]{0,62}$/;

export const SnapshotParams = z.object({ name: z.string().regex(SNAPSHOT_NAME) });

export const CreateSnapshot = z
  .strictObject({
    sandbox_id: text({ max: 128 }),
    name: z.string().regex(SNAPSHOT_NAME, `must match ${SNAPSHOT_NAME.source}`),
    overwrite: z.boolean().default(false),
  })
  .meta({ id: "CreateSnapshot" });

export const Snapshot = z
  .object({
    id: z.string(),
    name: z.string(),
    vcpus: z.int(),
    memory_mb: z.int(),
    disk_mb: z.int(),
    size_bytes: z.int().min(0),
    created_at: Time,
  })
  .meta({ id: "Snapshot" });

export const SnapshotPage = pageOf(Snapshot).meta({ id: "SnapshotPage" });

export const Template = z
  .object({
    id: z.string(),
    name: z.string(),
    kind: z.enum(["platform", "snapshot"]),
    vcpus: z.int(),
    memory_mb: z.int(),
    disk_mb: z.int(),
    created_at: Time,
  })
  .meta({ id: "Template" });

export const TemplatePage = pageOf(Template).meta({ id: "TemplatePage" });
