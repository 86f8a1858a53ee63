/** Sandboxes, their commands and files, as the API speaks of them. */
import { z } from "zod";
import { ID_PATTERNS, isSandboxId } from "../../model/ids.ts";
import { SANDBOX_STATUSES } from "../../model/sandbox.ts";
import type { SandboxStatus } from "../../model/sandbox.ts";
import {
  environment,
  guestPath,
  idOf,
  metadataMap,
  pageOf,
  pageQuery,
  text,
  textOfBytes,
  Time,
} from "./common.ts";

const VCPUS = [1, 2, 4, 8] as const;
const MEMORY_MB = [256, 512, 1024, 2048, 4096, 8192, 16384] as const;
const MAX_DISK_MB = 65_536;
const MIN_TIMEOUT_SEC = 10;
const MAX_TIMEOUT_SEC = 604_800;
/** MAX_ARG_STRLEN of Linux, its final NUL included. */
const MAX_ARGUMENT_BYTES = 131_071;
const MAX_ARGUMENTS = 1024;
const MAX_EXEC_TIMEOUT_SEC = 86_400;

export const SandboxParams = z.object({ id: idOf(isSandboxId, ID_PATTERNS.sandbox) });

export const SandboxStatusSchema = z.enum(SANDBOX_STATUSES).meta({ id: "SandboxStatus" });

const timeoutSec = z
  .int()
  .min(0)
  .max(MAX_TIMEOUT_SEC)
  .refine(
    (seconds) => seconds === 0 || seconds >= MIN_TIMEOUT_SEC,
    `must be 0 (no limit) or from ${MIN_TIMEOUT_SEC} to ${MAX_TIMEOUT_SEC}`,
  )
  .describe(`0 (no limit), or from ${MIN_TIMEOUT_SEC} to ${MAX_TIMEOUT_SEC}.`);
const onTimeout = z.enum(["pause", "destroy"]);
const timeoutMode = z
  .enum(["idle", "absolute"])
  .describe("idle: exec, file calls, open streams, proxied requests and ping begin the time anew.");

export const Sandbox = z
  .object({
    id: z.string(),
    status: SandboxStatusSchema,
    template: z.string(),
    host_id: z.string().optional(),
    vcpus: z.int(),
    memory_mb: z.int(),
    disk_mb: z.int(),
    timeout_sec: z.int(),
    on_timeout: onTimeout,
    timeout_mode: timeoutMode,
    env: z.record(z.string(), z.string()).optional().describe("Not in lists."),
    metadata: z.record(z.string(), z.string()),
    created_at: Time,
    started_at: Time.optional(),
    expires_at: Time.optional(),
    ended_at: Time.optional(),
    error: z
      .object({ code: z.string(), message: z.string() })
      .optional()
      .describe("Why it failed, or why its last pause or resume went back."),
    disk_used_bytes: z.int().optional(),
  })
  .meta({ id: "Sandbox" });

export const SandboxPage = pageOf(Sandbox).meta({ id: "SandboxPage" });

export const CreateSandbox = z
  .strictObject({
    template: text({ min: 1, max: 128 }).default("base").describe("Name or id of a template or snapshot."),
    vcpus: z.literal(VCPUS).optional().describe("Absent: as the template says (base: 1)."),
    memory_mb: z.literal(MEMORY_MB).optional().describe("Absent: as the template says (base: 512)."),
    disk_mb: z
      .int()
      .min(1)
      .max(MAX_DISK_MB)
      .optional()
      .describe("At least the template's size, which it also is when absent (base: 4096). Never shrinks."),
    timeout_sec: timeoutSec.default(300),
    on_timeout: onTimeout.default("pause"),
    timeout_mode: timeoutMode.default("idle"),
    env: environment.default(() => ({})),
    metadata: metadataMap.default(() => ({})),
  })
  .meta({ id: "CreateSandbox" });

export const UpdateSandbox = z
  .strictObject({
    timeout_sec: timeoutSec.optional(),
    on_timeout: onTimeout.optional(),
    timeout_mode: timeoutMode.optional(),
    metadata: metadataMap.optional().describe("Replaces all of it."),
  })
  .meta({ id: "UpdateSandbox" });

const METADATA_PREFIX = "metadata.";
const MAX_METADATA_FILTERS = 16;

/** `status=a,b`, and `metadata.KEY=value` for any KEY: the one query whose names are open. */
export const ListSandboxesQuery = z
  .object({
    ...pageQuery,
    status: z
      .string()
      .max(256)
      .transform((list, context): SandboxStatus[] => {
        const statuses = list.split(",");
        if (statuses.every(isStatus)) return statuses;
        context.addIssue({
          code: "custom",
          message: `must be a comma-separated list of ${SANDBOX_STATUSES.join(", ")}`,
        });
        return z.NEVER;
      })
      .optional()
      .meta({ type: "string", description: "Comma-separated statuses. Absent: all that are not final." }),
    // Stands for every KEY in the document; at work it is one KEY among others.
    "metadata.KEY": z.string().optional().describe("Only sandboxes whose metadata has this value at KEY."),
  })
  .catchall(z.unknown())
  .transform((query, context) => {
    const { limit, cursor, status, ...open } = query;
    // Without a prototype: a KEY may have any name.
    const filter: Record<string, unknown> = Object.create(null);
    for (const [name, value] of Object.entries(open)) {
      if (!name.startsWith(METADATA_PREFIX)) {
        context.addIssue({ code: "unrecognized_keys", keys: [name], input: query });
        return z.NEVER;
      }
      filter[name.slice(METADATA_PREFIX.length)] = value;
    }
    const metadata = parseMetadataFilter(filter, context);
    return { limit, cursor, statuses: status ?? [], metadata };
  });

function isStatus(name: string): name is SandboxStatus {
  return (SANDBOX_STATUSES as readonly string[]).includes(name);
}

function parseMetadataFilter(
  filter: Record<string, unknown>,
  context: z.RefinementCtx,
): Record<string, string> {
  if (Object.keys(filter).length > MAX_METADATA_FILTERS) {
    context.addIssue({
      code: "custom",
      path: ["metadata"],
      message: `must be asked for by at most ${MAX_METADATA_FILTERS} keys at once`,
    });
    return z.NEVER;
  }
  const parsed = metadataMap.safeParse(filter);
  if (parsed.success) return parsed.data;
  for (const issue of parsed.error.issues) {
    context.addIssue({ code: "custom", path: ["metadata", ...issue.path], message: issue.message });
  }
  return z.NEVER;
}

export const Exec = z
  .strictObject({
    cmd: textOfBytes({ min: 1, max: MAX_ARGUMENT_BYTES }).describe("The program; with shell, a script."),
    args: z
      .array(textOfBytes({ max: MAX_ARGUMENT_BYTES }))
      .max(MAX_ARGUMENTS)
      .default(() => []),
    shell: z.boolean().default(false).describe("Run cmd by bash -lc."),
    cwd: guestPath.optional(),
    env: environment.default(() => ({})),
    user: text({ min: 1, max: 64 })
      .regex(/^[A-Za-z0-9_][A-Za-z0-9_.-]*\$?$/, "must be a user name")
      .optional(),
    stdin: text({ max: 1_048_576 }).optional(),
    timeout_sec: z
      .number()
      .positive()
      .max(MAX_EXEC_TIMEOUT_SEC)
      .default(30)
      .describe("After this the whole process group is killed."),
  })
  .meta({ id: "Exec" });

export const ExecAnswer = z
  .object({
    stdout: z.string(),
    stderr: z.string(),
    exit_code: z.int(),
    signal: z.string().optional(),
    timed_out: z.boolean(),
    truncated: z.boolean().describe("stdout or stderr was longer than 4 MiB and is cut."),
    duration_ms: z.int().min(0),
    encoding: z.enum(["utf-8", "base64"]).describe("base64, of both, when either is not UTF-8."),
  })
  .meta({ id: "ExecAnswer" });

export const ReadFile = z.strictObject({ path: guestPath }).meta({ id: "ReadFile" });

export const WriteFileQuery = z.strictObject({
  path: guestPath.optional().describe("With application/octet-stream, whose body is the file."),
});
