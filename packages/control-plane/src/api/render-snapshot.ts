/** Snapshots and templates, as JSON shows them. */
import type { z } from "zod";
import type { Page, Snapshot, Template } from "../service/services.ts";
import type {
  Snapshot as SnapshotSchema,
  SnapshotPage,
  Template as TemplateSchema,
  TemplatePage,
} from "./schemas/snapshots.ts";

export function renderSnapshot(snapshot: Snapshot): z.output<typeof SnapshotSchema> {
  return {
    id: snapshot.id,
    name: snapshot.name,
    vcpus: snapshot.vcpus,
    memory_mb: snapshot.memoryMb,
    disk_mb: snapshot.diskMb,
    size_bytes: snapshot.sizeBytes,
    created_at: snapshot.createdAt.toISOString(),
  };
}

export function renderSnapshotPage({ items, nextCursor }: Page<Snapshot>): z.output<typeof SnapshotPage> {
  return { items: items.map(renderSnapshot), next_cursor: nextCursor };
}

function renderTemplate(template: Template): z.output<typeof TemplateSchema> {
  return {
    id: template.id,
    name: template.name,
    kind: template.kind,
    vcpus: template.vcpus,
    memory_mb: template.memoryMb,
    disk_mb: template.diskMb,
    created_at: template.createdAt.toISOString(),
  };
}

export function renderTemplatePage({ items, nextCursor }: Page<Template>): z.output<typeof TemplatePage> {
  return { items: items.map(renderTemplate), next_cursor: nextCursor };
}
