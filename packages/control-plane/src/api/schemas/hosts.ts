/**
 * Hosts, as people and agents speak of them.
 *
 * What agents send is read leniently: an agent may be newer than its control
 * plane, and a heartbeat refused for an unknown field would in the end make the
 * agent pause every sandbox it has.
 */
import { z } from "zod";
import { ID_PATTERNS, isHostId } from "../../model/ids.ts";
import { SANDBOX_STATUSES } from "../../model/sandbox.ts";
import { idOf, label, metadataMap, pageOf, text, textMap, Time } from "./common.ts";

export const HostParams = z.object({ id: idOf(isHostId, ID_PATTERNS.host) });

const hostType = z.enum(["shared", "byoc"]);

export const Host = z
  .object({
    id: z.string(),
    name: z.string(),
    type: hostType,
    team_id: z.string().optional(),
    status: z.enum(["pending", "online", "unreachable", "draining"]),
    address: z.string().optional(),
    arch: z.string().optional(),
    cpus: z.int().optional(),
    memory_mb: z.int().optional(),
    disk_mb: z.int().optional(),
    drivers: z.record(z.string(), z.string()).optional(),
    version: z.string().optional(),
    labels: z.record(z.string(), z.string()),
    sandboxes: z.int().describe("How many of its sandboxes are not final."),
    strangers: z
      .int()
      .describe("Sandboxes on it that the database does not know: stopped, and destroyed after a while."),
    strangers_untouched: z
      .boolean()
      .describe("There are so many strangers that none is touched: is this the right database?"),
    last_heartbeat_at: Time.optional(),
    revoked_at: Time.optional().describe("Its credentials were revoked, and it has not registered since."),
    created_at: Time,
  })
  .meta({ id: "Host" });

export const HostPage = pageOf(Host).meta({ id: "HostPage" });

export const CreateHost = z
  .strictObject({ name: label(128), type: hostType, labels: metadataMap.default(() => ({})) })
  .meta({ id: "CreateHost" });

export const UpdateHost = z
  .strictObject({
    name: label(128).optional(),
    labels: metadataMap.optional().describe("Replaces all of them."),
  })
  .meta({ id: "UpdateHost" });

export const DeleteHostQuery = z.strictObject({
  force: z
    .enum(["true", "false"])
    .default("false")
    .transform((force) => force === "true")
    .describe("End all that is on it."),
});

export const HostContents = z
  .object({
    sandboxes: z.array(z.object({ id: z.string(), team_id: z.string(), status: z.enum(SANDBOX_STATUSES) })),
    sandbox_count: z.int(),
    snapshots: z
      .array(z.object({ id: z.string(), team_id: z.string(), name: z.string(), size_bytes: z.int() }))
      .describe("Those that are nowhere else."),
    snapshot_count: z.int(),
  })
  .describe("The first of each kind, and how many there are.")
  .meta({ id: "HostContents" });

export const HostRegistrationToken = z
  .object({ host: Host, registration_token: z.string().describe("Good once."), expires_at: Time })
  .meta({ id: "HostRegistrationToken" });

const token = text({ min: 1, max: 4096 });
const count = z.int().min(0);

export const RegisterHost = z
  .object({
    token,
    address: text({ min: 1, max: 512 }),
    certificate_fingerprint: z
      .string()
      .regex(/^[0-9a-f]{64}$/, "must be the SHA-256 of the certificate, 64 hex digits")
      .optional(),
    public_key: text({ min: 1, max: 1024 }).regex(/^[A-Za-z0-9+/]+={0,2}$/, "must be SPKI in base64"),
    proof: text({ min: 1, max: 4096 })
      .optional()
      .describe(
        "JWT (EdDSA) by that key: aud rookery-control-plane, purpose register, token: SHA-256 of the token, hex. With it the token may be shown again, until what it gave was used.",
      ),
    arch: label(32),
    cpus: z.int().min(1).max(65_536),
    memory_mb: z.int().min(1),
    disk_mb: z.int().min(1),
    drivers: textMap({ maxValueLength: 128 }),
    version: label(128),
  })
  .meta({ id: "RegisterHost" });

export const Registration = z
  .object({
    host_id: z.string(),
    cluster_id: z.string(),
    access_token: z.string(),
    refresh_token: z.string(),
    control_plane_key: z.string(),
  })
  .meta({ id: "HostRegistration" });

export const Heartbeat = z
  .object({
    load: z.object({
      cpus: z.number().min(0),
      memory_mb_used: count,
      disk_mb_free: count,
      sandboxes: count,
    }),
    digest: text({ max: 256 }),
    event_log_id: text({ max: 128 }),
    last_event_number: count,
    snapshots: z
      .object({ compat: text({ min: 1, max: 256 }), store_id: text({ min: 1, max: 128 }).optional() })
      .optional()
      .describe("Which other hosts' snapshots it can load, and the object store that it shares."),
  })
  .meta({ id: "Heartbeat" });

export const HeartbeatAnswer = z.object({ acknowledged_event: z.int() }).meta({ id: "HeartbeatAnswer" });

export const RefreshTokens = z.object({ refresh_token: token }).meta({ id: "RefreshTokens" });

export const RefreshedTokens = z
  .object({ access_token: z.string(), refresh_token: z.string() })
  .meta({ id: "RefreshedTokens" });
