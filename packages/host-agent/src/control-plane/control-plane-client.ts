/**
 * The three calls that an agent makes to its control plane (API.md, Hosts).
 *
 * Answers are bounded and parsed. A 401 or 403 is `TokenRefused`; whatever else
 * goes wrong says nothing about trust and is worth another try.
 */
import { Agent, request } from "undici";
import { z } from "zod";

/** The control plane answered that it does not accept the token that was shown. */
export class TokenRefused extends Error {
  override readonly name = "TokenRefused";
  /** What the answer says of the host itself: nothing to rely on, save for what the proof proves. */
  readonly hostEnd: HostEnd | undefined;

  constructor(message: string, hostEnd?: HostEnd) {
    super(message);
    this.hostEnd = hostEnd;
  }
}

export interface HostEnd {
  reason: "host_deleted" | "host_revoked";
  /** A statement of the control plane, signed with its key (rpc/auth.ts). */
  proof?: string | undefined;
}

export interface HostDescription {
  address: string;
  /** SHA-256 of our certificate, hex; absent where we are called on loopback alone. */
  certificateFingerprint?: string | undefined;
  /** Ed25519, SPKI (DER) in base64. */
  publicKey: string;
  arch: string;
  cpus: number;
  memoryMb: number;
  diskMb: number;
  drivers: Readonly<Record<string, string>>;
  version: string;
}

export interface Heartbeat {
  load: { cpus: number; memoryMbUsed: number; diskMbFree: number; sandboxes: number };
  digest: string;
  eventLogId: string;
  lastEventNumber: bigint;
  snapshots: SnapshotSharing;
}

/** What this host can do with snapshots of others. */
export interface SnapshotSharing {
  compat: string;
  /** Undefined: it uses no object store, or that is away and was not seen yet. */
  storeId?: string | undefined;
}

const registrationSchema = z.object({
  host_id: z.string(),
  cluster_id: z.string(),
  access_token: z.string(),
  refresh_token: z.string(),
  control_plane_key: z.string(),
});
const heartbeatSchema = z.object({ acknowledged_event: z.int().min(0).transform(BigInt) });
const refreshSchema = z.object({ access_token: z.string().min(1), refresh_token: z.string().min(1) });
const hostEndSchema = z.object({
  error: z.object({
    details: z.object({
      reason: z.enum(["host_deleted", "host_revoked"]),
      proof: z.string().max(4_096).optional(),
    }),
  }),
});
const failureSchema = z.object({ error: z.object({ code: z.string(), message: z.string() }) });

const MAX_ANSWER_BYTES = 64 << 10;

/** How a request travels: by undici, or over a network that a test made. */
export type Send = (
  url: URL,
  request: { method: "POST"; headers: Record<string, string>; body: string; signal: AbortSignal },
) => Promise<{ statusCode: number; body: AsyncIterable<Uint8Array> }>;

export class ControlPlaneClient {
  readonly #url: string;
  readonly #timeoutMs: number;
  readonly #connections: Agent;
  readonly #send: Send;

  /** `ca`: PEM of the only authorities whose word counts; absent: Node's own list. */
  constructor(url: string, options: { timeoutMs: number; ca?: string | undefined; send?: Send }) {
    this.#url = url;
    this.#timeoutMs = options.timeoutMs;
    this.#connections = new Agent(options.ca === undefined ? {} : { connect: { ca: options.ca } });
    this.#send =
      options.send ?? ((to, message) => request(to, { ...message, dispatcher: this.#connections }));
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#connections.destroy();
  }

  /** `proof`: that we have the key (register.ts). */
  register(
    token: string,
    host: HostDescription,
    proof: string,
    signal: AbortSignal,
  ): Promise<z.output<typeof registrationSchema>> {
    const body = {
      token,
      address: host.address,
      certificate_fingerprint: host.certificateFingerprint,
      public_key: host.publicKey,
      proof,
      arch: host.arch,
      cpus: host.cpus,
      memory_mb: host.memoryMb,
      disk_mb: host.diskMb,
      drivers: host.drivers,
      version: host.version,
    };
    return this.#post("/v1/hosts/register", { body, answer: registrationSchema }, signal);
  }

  async heartbeat(
    hostId: string,
    accessToken: string,
    { load, digest, eventLogId, lastEventNumber, snapshots }: Heartbeat,
    signal: AbortSignal,
  ): Promise<{ acknowledgedEvent: bigint }> {
    const body = {
      load: {
        cpus: load.cpus,
        memory_mb_used: load.memoryMbUsed,
        disk_mb_free: load.diskMbFree,
        sandboxes: load.sandboxes,
      },
      digest,
      event_log_id: eventLogId,
      last_event_number: Number(lastEventNumber),
      snapshots: { compat: snapshots.compat, store_id: snapshots.storeId },
    };
    const answer = await this.#post(
      `/v1/hosts/${hostId}/heartbeat`,
      { body, answer: heartbeatSchema, accessToken },
      signal,
    );
    return { acknowledgedEvent: answer.acknowledged_event };
  }

  async refresh(
    refreshToken: string,
    signal: AbortSignal,
  ): Promise<{ accessToken: string; refreshToken: string }> {
    const body = { refresh_token: refreshToken };
    const answer = await this.#post("/v1/hosts/auth/refresh", { body, answer: refreshSchema }, signal);
    return { accessToken: answer.access_token, refreshToken: answer.refresh_token };
  }

  async #post<S extends z.ZodType>(
    path: string,
    call: { body: unknown; answer: S; accessToken?: string },
    signal: AbortSignal,
  ): Promise<z.output<S>> {
    const limit = AbortSignal.any([signal, AbortSignal.timeout(this.#timeoutMs)]);
    const { statusCode, body } = await this.#send(new URL(path, this.#url), {
      method: "POST",
      headers: {
        "content-type": "application/json",
        ...(call.accessToken === undefined ? {} : { authorization: `Bearer ${call.accessToken}` }),
      },
      body: JSON.stringify(call.body),
      signal: limit,
    });
    const answer = parseAnswer(await readText(body));
    if (statusCode === 401 || statusCode === 403) {
      const end = hostEndSchema.safeParse(answer);
      throw new TokenRefused(wordsOf(path, statusCode, answer), end.data?.error.details);
    }
    if (statusCode < 200 || statusCode > 299) throw new Error(wordsOf(path, statusCode, answer));
    const parsed = call.answer.safeParse(answer);
    if (!parsed.success) throw new Error(`${path}: the answer is not understood: ${parsed.error.message}`);
    return parsed.data;
  }
}

async function readText(body: AsyncIterable<Uint8Array>): Promise<string> {
  const parts: Uint8Array[] = [];
  let length = 0;
  for await (const part of body) {
    length += part.byteLength;
    if (length > MAX_ANSWER_BYTES) throw new Error("the control plane's answer is too long");
    parts.push(part);
  }
  return Buffer.concat(parts).toString("utf8");
}

/** undefined for what is no JSON, such as the page of a proxy in between. */
function parseAnswer(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}

function wordsOf(path: string, status: number, answer: unknown): string {
  const failure = failureSchema.safeParse(answer);
  const words = failure.success ? `${failure.data.error.code}: ${failure.data.error.message}` : "";
  return `${path}: ${status} ${words}`.trimEnd();
}
