/**
 * `node scripts/generate-docs.ts`: writes docs/errors.md out of the error table.
 *
 * What a code means stands here, beside what to do about it; the types demand a
 * line for each code of the table, and a test that the file is current.
 */
import { writeFileSync } from "node:fs";
import { ERRORS } from "../packages/protocol/src/errors.ts";
import type { ErrorCode } from "../packages/protocol/src/errors.ts";

interface Meaning {
  cause: string;
  /** What a caller does about it. */
  remedy: string;
  details?: string;
}

const MEANINGS: Record<ErrorCode, Meaning> = {
  invalid_request: {
    cause: "The request breaks a rule of its schema, or is malformed.",
    remedy: "Mend the field that `details.field` names.",
    details: "`field`, `reason`; `violations`, a list of both, when there are several",
  },
  unsupported_shape: {
    cause: "This template can't be had with these vCPUs, this memory or this disk.",
    remedy: "Leave the shape away to get the template's own. A snapshot's vCPUs and memory are fixed.",
  },
  invalid_path: {
    cause:
      "The guest can't use this path so: it is a directory, or a part of it is none, or it may not be touched.",
    remedy: "Give another path.",
  },
  unauthenticated: {
    cause: "There is no API key, or it is not known.",
    remedy: "Give a key in `X-API-Key`, or as `Authorization: Bearer`.",
  },
  invalid_token: {
    cause: "A host's registration, access or refresh token is unknown, spent, expired or revoked.",
    remedy: "Agents renew by themselves; a host that can't needs a new registration token.",
    details: "`reason` (`host_deleted`, `host_revoked`), to who proves to be that host",
  },
  forbidden: { cause: "The key's role does not allow this.", remedy: "Use a platform key." },
  not_found: {
    cause: "It does not exist, or belongs to another team; also for malformed ids and unknown paths.",
    remedy: "List what there is.",
  },
  file_not_found: { cause: "The guest has no such file or program.", remedy: "Give another path." },
  template_not_found: {
    cause: "No template or snapshot of the team has this name or id.",
    remedy: "See `GET /v1/templates`.",
  },
  method_not_allowed: { cause: "The path does not take this method.", remedy: "See the `Allow` header." },
  not_acceptable: {
    cause: "What the caller accepts can't be given.",
    remedy: "Accept what the document says of this call.",
  },
  wrong_state: {
    cause: "The sandbox or host is in a state in which this can't be done.",
    remedy: "Look at its status; wait, resume it, or make another.",
    details: "`status`",
  },
  already_exists: {
    cause: "The name is taken.",
    remedy: "Take another, or `overwrite` where the call has it.",
  },
  host_has_sandboxes: {
    cause: "Sandboxes, or snapshots that are nowhere else, would end with the host.",
    remedy: "Drain it and wait, destroy them, or `force=true`.",
    details: "`sandboxes`, `snapshots` (100 each at most), `sandbox_count`, `snapshot_count`",
  },
  idempotency_mismatch: {
    cause: "This `Idempotency-Key` was used with another body.",
    remedy: "Use a new key for a new request.",
  },
  stale_generation: {
    cause: "A host refused a command that a newer one had overtaken.",
    remedy: "Look at the sandbox: what overtook it has happened.",
  },
  payload_too_large: {
    cause: "A JSON body above 1 MiB, or a file above the limit.",
    remedy: "Send less at once.",
    details: "`limit_bytes`",
  },
  unsupported_media_type: {
    cause: "The call does not take a body of this `Content-Type` or `Content-Encoding`.",
    remedy: "Send `application/json`, or what the document says of this call.",
  },
  range_not_satisfiable: { cause: "The file has no such range.", remedy: "Ask for one that it has." },
  quota_exceeded: {
    cause: "The team has as many as it may.",
    remedy: "End some, or have the quota raised.",
  },
  rate_limited: {
    cause: "The key calls too often.",
    remedy: "Wait as long as `Retry-After` says.",
    details: "`retry_after_sec`",
  },
  internal: {
    cause: "Something failed on our side that should not have.",
    remedy: "Report it with the answer's `X-Request-Id`; the log has the rest.",
  },
  host_error: {
    cause: "The host failed at it; what was begun is undone.",
    remedy: "Try again; when it repeats, look at the agent's log.",
  },
  guest_error: {
    cause: "The guest gave a broken answer, or none that can be used.",
    remedy:
      "With `retry_after_sec` nothing was done: call again then. Else its own processes may have broken it; when it stays so, make another sandbox.",
    details: "`retry_after_sec`",
  },
  no_capacity: { cause: "No host has room.", remedy: "Wait, end sandboxes, or add a host." },
  host_unreachable: {
    cause: "The sandbox's host does not answer.",
    remedy: "Try again; a sandbox that is `missing` is there again when its host is.",
  },
  unavailable: {
    cause: "The database is away, or this server is shutting down.",
    remedy: "Try again as `Retry-After` says.",
  },
  timeout: {
    cause: "It was not done in time; it may still be carried out.",
    remedy: "Look at the sandbox before trying again.",
  },
  out_of_disk: {
    cause: "The host's disk, or the guest's, is full.",
    remedy: "Free disk: in the guest for files, on the host for all else.",
  },
};

export function errorsPage(): string {
  const codes = Object.keys(ERRORS) as ErrorCode[]; // oxlint-disable-line typescript/no-unsafe-type-assertion -- its own keys
  const rows = codes.map((code) => {
    const { status, retry } = ERRORS[code];
    const { cause, remedy, details } = MEANINGS[code];
    return `| \`${code}\` | ${status} | ${retry ? "yes" : "no"} | ${cause} | ${remedy} | ${details ?? ""} |`;
  });
  return `# Errors

<!-- Made by scripts/generate-docs.ts out of packages/protocol/src/errors.ts. -->

Every failed call answers \`{"error":{"code","message","details?"}}\`. Decide by \`code\`: a code has one cause and never changes its status. \`message\` is for people and may change. \`retry\` says whether the same request may succeed later without a change; a request that makes something should then carry an \`Idempotency-Key\`.

The same codes travel between control plane and host agent, as the \`ErrorInfo\` detail of a Connect error.

| code | HTTP | retry | cause | what to do | details |
| --- | --- | --- | --- | --- | --- |
${rows.join("\n")}
`;
}

if (import.meta.main) writeFileSync(new URL("../docs/errors.md", import.meta.url), errorsPage());
