/**
 * The agent's configuration: environment and flags, parsed once into a frozen
 * object. Only `main.ts` hands it `process.env`; nobody else reads it.
 */
import { createHash } from "node:crypto";
import { isIP, isIPv6 } from "node:net";
import { isAbsolute, join, resolve } from "node:path";
import { RookeryError } from "@rookery/protocol/errors";
import { z } from "zod";
import { isLoopback } from "./host/loopback.ts";

/** What the command line may say; each wins over its variable. */
export interface ConfigFlags {
  data?: string | undefined;
  address?: string | undefined;
  controlPlane?: string | undefined;
  register?: string | undefined;
}

const integer = (fallback: number, { min = 0, max = Number.MAX_SAFE_INTEGER } = {}) =>
  z
    .string()
    .regex(/^\d{1,15}$/, "must be a whole number")
    .transform(Number)
    .pipe(z.number().min(min).max(max))
    .default(fallback);
const path = z.string().refine(isAbsolute, "must be an absolute path");

const environmentSchema = z.object({
  /** Everything that outlives the agent lies here, on one file system. */
  ROOKERY_AGENT_DATA: z
    .string()
    .min(1)
    .default("/var/lib/rookery/agent")
    .transform((text) => resolve(text)),
  /** Guest images, when agents of this machine are to share them; same file system as the data. */
  ROOKERY_IMAGE_DIR: path.optional(),
  /** Sockets: short, since their paths end at 107 bytes. */
  ROOKERY_RUNTIME_DIR: path.optional(),
  /** Where the control plane finds this agent. */
  ROOKERY_AGENT_ADDRESS: z.string().default("127.0.0.1:7071"),
  /** Where the agent listens, when that is another address than the one it is found at. */
  ROOKERY_AGENT_LISTEN: z.string().optional(),
  ROOKERY_CONTROL_PLANE: z.url({ protocol: /^https?$/ }).optional(),
  /** PEM file of the only authorities that the control plane's certificate may come from; default: Node's. */
  ROOKERY_CONTROL_PLANE_CA: path.optional(),
  ROOKERY_REGISTRATION_TOKEN: z.string().min(1).max(512).optional(),
  /** "simulated" runs no guests: for scale and fault tests; `auto` never chooses it. */
  ROOKERY_VMM: z.enum(["auto", "qemu", "simulated"]).default("auto"),
  ROOKERY_ROOT_DISK: z.enum(["auto", "qcow2", "simulated"]).default("auto"),
  ROOKERY_NETWORK: z.enum(["auto", "netns", "user", "simulated"]).default("auto"),
  /** Of the timings of a simulated VMM. */
  ROOKERY_SIMULATED_SEED: integer(1),
  /** Waiting clones of the default image; 0 turns pools off. */
  ROOKERY_POOL: integer(4, { max: 256 }),
  /** VMMs that can live at once, waiting ones too. */
  ROOKERY_SLOTS: integer(512, { min: 2, max: 2_048 }).refine(
    (slots) => Number.isInteger(Math.log2(slots)),
    "must be a power of two",
  ),
  /** uid of slot 0, of as many as there are slots; default: a range that follows from the data directory. */
  ROOKERY_UID_BASE: integer(0, { max: 4_000_000_000 }).transform((uid) => (uid === 0 ? undefined : uid)),
  ROOKERY_MAX_SANDBOXES: integer(1_000, { min: 1 }),
  /** Operations at work at once; 0: twice the CPUs. */
  ROOKERY_WORK_LIMIT: integer(0, { max: 1_024 }),
  /** Guest memory of live sandboxes, in per cent of the host's memory. */
  ROOKERY_MEMORY_PERCENT: integer(400, { min: 1, max: 10_000 }),
  ROOKERY_DISK_RESERVE_MB: integer(1_024),
  /** Disk for warm images beyond those in use. */
  ROOKERY_WARM_DISK_MB: integer(20_480),
  /** Where snapshots lie for other hosts: `dir:/path` or `s3://bucket/prefix`; default: nowhere. */
  ROOKERY_OBJECT_STORE: z.string().max(1_024).transform(parseObjectStore).optional(),
  /** Of an S3-compatible store that is not AWS. */
  ROOKERY_S3_ENDPOINT: z.url({ protocol: /^https?$/ }).optional(),
  ROOKERY_S3_REGION: z.string().min(1).max(64).default("us-east-1"),
  /** Default: what the SDK finds, such as the machine's role. */
  ROOKERY_S3_ACCESS_KEY_ID: z.string().min(1).max(256).optional(),
  ROOKERY_S3_SECRET_ACCESS_KEY: z.string().min(1).max(512).optional(),
  ROOKERY_S3_SESSION_TOKEN: z.string().min(1).max(8_192).optional(),
  /** Disk for copies of snapshots that the object store has. */
  ROOKERY_SNAPSHOT_DISK_MB: integer(20_480),
  /** Resolvers that guests may ask, one or two, comma-separated; default: the host's own where they are public. */
  ROOKERY_RESOLVERS: z
    .string()
    .default("")
    .transform((text) => text.split(",").filter((part) => part !== ""))
    .pipe(z.array(z.ipv4()).max(2)),
  ROOKERY_HEARTBEAT_MS: integer(30_000, { min: 10 }),
  /** Silence of the control plane after which all sandboxes are paused; 0: never. */
  ROOKERY_LOST_AFTER_MS: integer(300_000),
  ROOKERY_REAPER_MS: integer(500, { min: 10, max: 1_000 }),
  /** Between two looks whether a VMM still answers; 0: never. */
  ROOKERY_HANG_WATCH_MS: integer(10_000),
  /** For calls under way when the agent is told to stop. */
  ROOKERY_STOP_GRACE_MS: integer(10_000),
  ROOKERY_LOG_LEVEL: z.enum(["trace", "debug", "info", "warn", "error", "fatal", "silent"]).default("info"),
  /** Parts of the product beside this program; default: where the repository and its bundles have them. */
  ROOKERY_ENVD_BUNDLE: path.optional(),
  ROOKERY_GUEST_FILES: path.optional(),
  ROOKERY_GUEST_NODE: path.optional(),
  /** For tests alone: `NAME=error|kill[*TIMES]`, comma-separated. */
  ROOKERY_FAILPOINTS: z.string().optional(),
  /** For tests alone: "1" lets DATA/failpoints.json arm failpoints while the agent runs. */
  ROOKERY_TEST: z.enum(["0", "1"]).default("0"),
});

export type Config = ReturnType<typeof readConfig>;

/** `packageDir` is packages/host-agent: the folder above this program. Throws `invalid_request` that names the setting. */
export function readConfig(
  environment: Readonly<Record<string, string | undefined>>,
  flags: ConfigFlags,
  packageDir: string,
) {
  const given: Record<string, string | undefined> = { ...environment };
  if (flags.data !== undefined) given["ROOKERY_AGENT_DATA"] = flags.data;
  if (flags.address !== undefined) given["ROOKERY_AGENT_ADDRESS"] = flags.address;
  if (flags.controlPlane !== undefined) given["ROOKERY_CONTROL_PLANE"] = flags.controlPlane;
  if (flags.register !== undefined) given["ROOKERY_REGISTRATION_TOKEN"] = flags.register;

  const parsed = environmentSchema.safeParse(given);
  if (!parsed.success) {
    const [issue] = parsed.error.issues;
    throw new RookeryError("invalid_request", `${issue!.path.join(".")}: ${issue!.message}`);
  }
  const env = parsed.data;
  if (env.ROOKERY_CONTROL_PLANE !== undefined) assertPrivate(env.ROOKERY_CONTROL_PLANE);
  if (env.ROOKERY_REGISTRATION_TOKEN !== undefined && env.ROOKERY_CONTROL_PLANE === undefined) {
    throw new RookeryError(
      "invalid_request",
      "A registration token needs the control plane's URL (--control-plane)",
    );
  }
  const dataDir = env.ROOKERY_AGENT_DATA;
  /** Marks what must live outside of the data directory as this agent's and no other's. */
  const instance = createHash("sha256").update(dataDir).digest("hex").slice(0, 8);

  return Object.freeze({
    dataDir,
    imagesDir: env.ROOKERY_IMAGE_DIR ?? join(dataDir, "images"),
    instance,
    /** All VMMs' cgroups are below this one. */
    cgroup: `rookery-${instance}`,
    runtimeDir:
      env.ROOKERY_RUNTIME_DIR ??
      // Nothing of a simulated VMM is a socket: its directories need no short paths, and no root.
      (env.ROOKERY_VMM === "simulated" ? join(dataDir, "sockets") : `/run/rookery-${instance}/agent`),
    ...addresses(env.ROOKERY_AGENT_ADDRESS, env.ROOKERY_AGENT_LISTEN),
    controlPlaneUrl: env.ROOKERY_CONTROL_PLANE,
    controlPlaneCaFile: env.ROOKERY_CONTROL_PLANE_CA,
    registrationToken: env.ROOKERY_REGISTRATION_TOKEN,
    drivers: driversOf(env),
    simulatedSeed: env.ROOKERY_SIMULATED_SEED,
    poolSize: env.ROOKERY_POOL,
    maxSlots: env.ROOKERY_SLOTS,
    uidBase: env.ROOKERY_UID_BASE,
    maxSandboxes: env.ROOKERY_MAX_SANDBOXES,
    workLimit: env.ROOKERY_WORK_LIMIT,
    memoryPercent: env.ROOKERY_MEMORY_PERCENT,
    diskReserveBytes: env.ROOKERY_DISK_RESERVE_MB * 1024 * 1024,
    warmDiskBytes: env.ROOKERY_WARM_DISK_MB * 1024 * 1024,
    objectStore: objectStoreOf(env),
    snapshotDiskBytes: env.ROOKERY_SNAPSHOT_DISK_MB * 1024 * 1024,
    resolvers: Object.freeze(env.ROOKERY_RESOLVERS),
    intervals: Object.freeze({
      heartbeatMs: env.ROOKERY_HEARTBEAT_MS,
      lostAfterMs: env.ROOKERY_LOST_AFTER_MS,
      reaperMs: env.ROOKERY_REAPER_MS,
      hangWatchMs: env.ROOKERY_HANG_WATCH_MS,
      stopGraceMs: env.ROOKERY_STOP_GRACE_MS,
    }),
    logLevel: env.ROOKERY_LOG_LEVEL,
    envdBundleDir: env.ROOKERY_ENVD_BUNDLE ?? join(packageDir, "..", "envd", "dist"),
    guestFilesDir: env.ROOKERY_GUEST_FILES ?? join(packageDir, "..", "guest-image"),
    guestNode: env.ROOKERY_GUEST_NODE ?? process.execPath,
    failpoints: Object.freeze({
      specification: env.ROOKERY_FAILPOINTS,
      controlFile: env.ROOKERY_TEST === "1" ? join(dataDir, "failpoints.json") : undefined,
      hitsFile:
        env.ROOKERY_TEST === "1" || env.ROOKERY_FAILPOINTS !== undefined
          ? join(dataDir, "failpoint-hits")
          : undefined,
    }),
  });
}

/** A simulated VMM comes with simulated disk and network, and these with nothing else. */
function driversOf(env: z.output<typeof environmentSchema>) {
  const { ROOKERY_VMM: vmm, ROOKERY_ROOT_DISK: rootDisk, ROOKERY_NETWORK: network } = env;
  if (vmm === "simulated") {
    for (const [name, kind] of Object.entries({ ROOKERY_ROOT_DISK: rootDisk, ROOKERY_NETWORK: network })) {
      if (kind === "auto" || kind === "simulated") continue;
      throw new RookeryError("invalid_request", `${name}: the simulated VMM takes no ${kind}`);
    }
    return Object.freeze({ vmm, rootDisk: "simulated", network: "simulated" } as const);
  }
  if (rootDisk === "simulated" || network === "simulated") {
    throw new RookeryError(
      "invalid_request",
      "ROOKERY_VMM: only the simulated VMM takes simulated disks or networks",
    );
  }
  return Object.freeze({ vmm, rootDisk, network });
}

/** Where `openObjectStore` finds it. It holds a secret: never logged as a whole. */
export type ObjectStoreSettings =
  | { kind: "directory"; path: string }
  | {
      kind: "s3";
      bucket: string;
      prefix: string;
      region: string;
      endpoint: string | undefined;
      credentials:
        | { accessKeyId: string; secretAccessKey: string; sessionToken: string | undefined }
        | undefined;
    };

function parseObjectStore(
  text: string,
  context: z.RefinementCtx,
): { kind: "directory"; path: string } | { kind: "s3"; bucket: string; prefix: string } {
  const path = /^dir:(\/.*)$/.exec(text)?.[1];
  if (path !== undefined) return { kind: "directory", path: resolve(path) };
  const s3 = /^s3:\/\/([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:\/([A-Za-z0-9/._-]*))?$/.exec(text);
  if (s3 !== null) return { kind: "s3", bucket: s3[1]!, prefix: (s3[2] ?? "").replace(/^\/+|\/+$/g, "") };
  context.addIssue("must be dir:/absolute/path or s3://bucket/prefix");
  return z.NEVER;
}

function objectStoreOf(env: z.output<typeof environmentSchema>): ObjectStoreSettings | undefined {
  const store = env.ROOKERY_OBJECT_STORE;
  if (store?.kind !== "s3") return store;
  const id = env.ROOKERY_S3_ACCESS_KEY_ID;
  const secret = env.ROOKERY_S3_SECRET_ACCESS_KEY;
  if ((id === undefined) !== (secret === undefined)) {
    throw new RookeryError(
      "invalid_request",
      "ROOKERY_S3_ACCESS_KEY_ID and ROOKERY_S3_SECRET_ACCESS_KEY go together",
    );
  }
  const credentials =
    id === undefined || secret === undefined
      ? undefined
      : { accessKeyId: id, secretAccessKey: secret, sessionToken: env.ROOKERY_S3_SESSION_TOKEN };
  return { ...store, region: env.ROOKERY_S3_REGION, endpoint: env.ROOKERY_S3_ENDPOINT, credentials };
}

/** "127.0.0.1:7071" or "[::1]:7071"; port 0 lets the kernel choose. */
export function parseAddress(text: string): { host: string; port: number } {
  const match = /^(?:\[([0-9a-fA-F:.]+)\]|([^:[\]]+)):(\d{1,5})$/.exec(text);
  const host = match?.[1] ?? match?.[2];
  const port = Number(match?.[3]);
  if (host === undefined || port > 65_535) {
    throw new RookeryError("invalid_request", `${text} is not an address such as 127.0.0.1:7071`);
  }
  return { host, port };
}

function addresses(addressText: string, listenText: string | undefined) {
  const address = parseAddress(addressText);
  const listen = listenText === undefined ? address : parseAddress(listenText);
  if (isUnspecified(address.host)) {
    throw new RookeryError(
      "invalid_request",
      `ROOKERY_AGENT_ADDRESS: nobody can call ${address.host}; say where the control plane finds this host, and ROOKERY_AGENT_LISTEN=${addressText}`,
    );
  }
  if (isIP(listen.host) === 0) {
    throw new RookeryError(
      "invalid_request",
      `ROOKERY_AGENT_LISTEN: must be an IP address with a port, such as 0.0.0.0:${address.port}, since ${listen.host} is a name`,
    );
  }
  return {
    /** What the control plane is told; port 0: the one that was bound. */
    address: Object.freeze(address),
    listen: Object.freeze(listen),
    /** TLS, unless nobody but this machine can call. */
    tls: !isLoopback(listen.host) || !isLoopback(address.host),
  };
}

function isUnspecified(host: string): boolean {
  return host === "0.0.0.0" || (isIPv6(host) && /^[0:]+$/.test(host));
}

/** Tokens go over this connection: plain HTTP is for loopback only. */
function assertPrivate(url: string): void {
  const { protocol, hostname } = new URL(url);
  if (protocol === "https:") return;
  if (hostname === "localhost" || hostname === "[::1]" || /^127(\.\d{1,3}){3}$/.test(hostname)) return;
  throw new RookeryError("invalid_request", `${url}: plain HTTP is for loopback only; use https`);
}
