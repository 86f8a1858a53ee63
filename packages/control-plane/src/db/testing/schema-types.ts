/**
 * Generates `db/schema.ts`, the types of every table, from a migrated database:
 * `npm run generate -w packages/control-plane`. A test demands that the
 * committed file is what comes out.
 */
import { Cli } from "kysely-codegen";

const IDS = ["ApiKeyId", "HostId", "SandboxId", "SnapshotId", "TeamId", "TemplateId"];
const JSON_TEXTS = "ColumnType<Readonly<Record<string, string>>, string, string>";

/** What SQL's types can't say: the words of check constraints, and the shapes in JSON columns. */
const COLUMNS: Record<string, string> = {
  "api_keys.id": "ApiKeyId",
  "api_keys.team_id": "TeamId",
  "host_refresh_tokens.host_id": "HostId",
  "host_registration_tokens.host_id": "HostId",
  "host_sandbox_digests.host_id": "HostId",
  "hosts.id": "HostId",
  "hosts.team_id": "TeamId | null",
  "idempotency_keys.team_id": "TeamId",
  "sandboxes.host_id": "HostId | null",
  "sandboxes.moving_from": "HostId | null",
  "sandboxes.id": "SandboxId",
  "sandboxes.snapshot_id": "SnapshotId | null",
  "sandboxes.team_id": "TeamId",
  "sandbox_events.host_id": "HostId | null",
  "sandbox_events.previous_status": "SandboxStatus | null",
  "sandbox_events.sandbox_id": "SandboxId",
  "sandbox_events.status": "SandboxStatus",
  "sandbox_events.team_id": "TeamId",
  "snapshot_copies.host_id": "HostId",
  "snapshot_copies.snapshot_id": "SnapshotId",
  "snapshots.host_id": "HostId",
  "snapshots.id": "SnapshotId",
  "snapshots.team_id": "TeamId",
  "teams.id": "TeamId",
  "templates.id": "TemplateId",
  "api_keys.role": '"member" | "platform"',
  "hosts.type": '"shared" | "byoc"',
  "hosts.status": 'Generated<"pending" | "online" | "unreachable">',
  "hosts.labels": JSON_TEXTS,
  "hosts.drivers": `${JSON_TEXTS} | null`,
  "hosts.load":
    "ColumnType<{ cpus: number; memoryMbUsed: number; diskMbFree: number; sandboxes: number } | null, string | null, string | null>",
  "snapshots.status": '"creating" | "ready" | "deleting"',
  "sandboxes.status": "SandboxStatus",
  "sandboxes.on_timeout": '"pause" | "destroy"',
  "sandboxes.timeout_mode": '"idle" | "absolute"',
  "sandboxes.env": JSON_TEXTS,
  "sandboxes.metadata": JSON_TEXTS,
};

export async function generateSchemaTypes(url: string, outFile: string): Promise<void> {
  await new Cli().generate({
    url,
    outFile,
    dialect: "postgres",
    logLevel: "silent",
    typeOnlyImports: true,
    excludePattern: "schema_migrations",
    typeMapping: { int8: "bigint" },
    customImports: {
      ...Object.fromEntries(IDS.map((id) => [id, "../model/ids.ts"])),
      SandboxStatus: "../model/sandbox.ts",
    },
    overrides: { columns: COLUMNS },
  });
}
