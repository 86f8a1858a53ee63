import { strict as assert } from "node:assert";
import { generateKeyPairSync } from "node:crypto";
import { mkdtemp, readFile, stat } from "node:fs/promises";
import { createServer } from "node:http";
import type { Server } from "node:http";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { digestOfSandboxes } from "@rookery/protocol/sandbox-digest";
import { SignJWT } from "jose";
import { afterEach, beforeEach, expect, test } from "vitest";
import { commandTokens, provesRegistrant, signEndHost } from "../../../control-plane/src/hosts/tokens.ts";
import { removeTree } from "../host/atomic-file.ts";
import { systemClock } from "../sandbox-manager/clock.ts";
import { ControlPlaneClient } from "./control-plane-client.ts";
import { ControlPlaneLink, LINK_FAILPOINTS } from "./control-plane-link.ts";
import type { LinkDeps } from "./control-plane-link.ts";
import { CredentialStore } from "./credentials.ts";
import { REGISTER_FAILPOINTS, registerHost } from "./register.ts";

type HostId = Parameters<typeof signEndHost>[1];
const HOST_ID = "host-abcdefghijklmnopqrst";
const { publicKey, privateKey } = generateKeyPairSync("ed25519");
const controlPlaneKey = publicKey.export({ format: "der", type: "spki" }).toString("base64");
const signal = new AbortController().signal;

/** A control plane that follows the rules of rotation; `fails` and `accepts` make it misbehave. */
class FakeControlPlane {
  calls: { path: string; authorization: string | undefined; body: Record<string, unknown> }[] = [];
  accepts = new Set<string>();
  /** The refresh token in use, and its successor that was made but not shown yet. */
  family: string[] = ["refresh-0"];
  fails: number | "hang" | "garbage" | "endless" | undefined;
  /** What it says of the host with each refusal. */
  hostEnd: { reason: string; proof?: string } | undefined;
  acknowledged = 0;
  /** The key that the registration token was spent with. */
  spentWith: unknown;
  nowSec = () => Math.floor(Date.now() / 1000);
  #server: Server | undefined;
  url = "";

  async start(): Promise<void> {
    this.#server = createServer((request, response) => {
      const parts: Buffer[] = [];
      request.on("data", (part: Buffer) => parts.push(part));
      request.on("end", () => {
        const body = JSON.parse(Buffer.concat(parts).toString()) as Record<string, unknown>;
        this.calls.push({ path: request.url!, authorization: request.headers.authorization, body });
        if (this.fails === "hang") return;
        if (this.fails === "garbage") return void response.end("<html>");
        if (this.fails === "endless") {
          const feed = (): void => {
            while (!response.destroyed && response.write("x".repeat(10_000))) continue;
          };
          response.on("drain", feed);
          return feed();
        }
        if (this.fails !== undefined) return void response.writeHead(this.fails).end();
        void this.#answer(request.url!, request.headers.authorization, body).then(
          (answer) => response.end(JSON.stringify(answer)),
          () => {
            const error = { code: "invalid_token", message: "no", details: this.hostEnd };
            response.writeHead(401).end(JSON.stringify({ error }));
          },
        );
      });
    });
    await new Promise<void>((resolve) => this.#server!.listen(0, "127.0.0.1", resolve));
    this.url = `http://127.0.0.1:${(this.#server.address() as { port: number }).port}`;
  }

  async stop(): Promise<void> {
    this.#server!.closeAllConnections();
    await new Promise((resolve) => this.#server!.close(resolve));
  }

  async accessToken(lifeSec = 1000): Promise<string> {
    const token = await new SignJWT({ jti: String(this.accepts.size) })
      .setProtectedHeader({ alg: "EdDSA" })
      .setIssuedAt(this.nowSec())
      .setExpirationTime(this.nowSec() + lifeSec)
      .sign(privateKey);
    this.accepts.add(token);
    return token;
  }

  async #answer(
    path: string,
    authorization: string | undefined,
    body: Record<string, unknown>,
  ): Promise<object> {
    if (path === "/v1/hosts/register") {
      if (body["token"] !== "one-time") throw new Error("spent");
      if ((this.spentWith ??= body["public_key"]) !== body["public_key"]) throw new Error("another agent");
      if (!(await provesRegistrant(String(body["proof"]), String(body["public_key"]), "one-time")))
        throw new Error("no proof");
      return {
        host_id: HOST_ID,
        cluster_id: "cluster-1",
        access_token: await this.accessToken(),
        refresh_token: this.family[0],
        control_plane_key: controlPlaneKey,
      };
    }
    if (path === "/v1/hosts/auth/refresh") {
      const shown = this.family.indexOf(String(body["refresh_token"]));
      // Shown after its successor was used: theft.
      if (shown === -1 || shown < this.family.length - 2) throw new Error("theft");
      if (shown === this.family.length - 2) this.family.pop();
      this.family.push(`refresh-${this.calls.length}`);
      return { access_token: await this.accessToken(), refresh_token: this.family.at(-1) };
    }
    if (!this.accepts.has((authorization ?? "").slice("Bearer ".length))) throw new Error("unknown");
    return { acknowledged_event: this.acknowledged, commands: [] };
  }

  paths(): string[] {
    return this.calls.map(({ path }) => path.split("/").at(-1)!);
  }
}

let dir: string;
let plane: FakeControlPlane;
let store: CredentialStore;
let deps: LinkDeps;
let nowMs: number;
let pauses: number;
let ends: number;
let acknowledged: bigint[];
let failAt: string | undefined;
let reached: Set<string>;

function reach(name: string): void {
  reached.add(name);
  if (name === failAt) throw new Error(`died at ${name}`);
}
const register = (token = "one-time") =>
  registerHost(
    { client: deps.client, store, controlPlaneUrl: plane.url, reach },
    token,
    {
      address: "127.0.0.1:7071",
      certificateFingerprint: "ab".repeat(32),
      arch: "x64",
      cpus: 2,
      memoryMb: 1000,
      diskMb: 1000,
      drivers: {},
      version: "0",
    },
    signal,
  );

beforeEach(async () => {
  dir = await mkdtemp(join(tmpdir(), "rookery-link-"));
  plane = new FakeControlPlane();
  await plane.start();
  store = await CredentialStore.open(dir);
  nowMs = 0;
  pauses = 0;
  ends = 0;
  acknowledged = [];
  failAt = undefined;
  reached = new Set();
  deps = {
    client: new ControlPlaneClient(plane.url, { timeoutMs: 300 }),
    store,
    clock: { ...systemClock, nowMs: () => Date.now() + nowMs, monotonicMs: () => nowMs },
    logger: { debug() {}, info() {}, warn() {}, error() {} },
    intervals: { heartbeatMs: 30_000, lostAfterMs: 300_000 },
    random: () => 0.5,
    sandboxes: () => [{ id: "sb1", phase: "running", generation: 3n }],
    load: async (sandboxes) => ({ cpus: 0.5, memoryMbUsed: 10, diskMbFree: 20, sandboxes }),
    snapshots: async () => ({ compat: "abc-tsc2000000", storeId: "store-1" }),
    events: {
      logId: "log-1",
      lastNumber: 9n,
      acknowledge: async (_logId, number) => void acknowledged.push(number),
    },
    pauseAll: async () => void (pauses += 1),
    endHost: async () => void (ends += 1),
    reach,
  };
});
afterEach(async () => {
  await plane.stop();
  await removeTree(dir);
});

test("a one-time token becomes credentials that only root can read, and is not shown twice", async () => {
  await register();
  const path = join(dir, "credentials.json");
  assert.equal((await stat(path)).mode & 0o777, 0o600);
  assert.equal(store.current?.hostId, HOST_ID);
  assert.deepEqual((await CredentialStore.open(dir)).current, store.current);
  await register();
  assert.equal(plane.calls.length, 1);
  assert.equal(plane.calls[0]!.body["certificate_fingerprint"], "ab".repeat(32));
  assert(!(await readFile(path, "utf8")).includes("one-time"));
});

test("a token that was refused changes nothing", async () => {
  await register();
  const before = store.current;
  await assert.rejects(register("spent"), { code: "invalid_token", message: /Ask for a new one/ });
  assert.deepEqual(store.current, before);
});

test("a heartbeat carries load, digest and events, and what is acknowledged is dropped", async () => {
  await register();
  plane.acknowledged = 4;
  await new ControlPlaneLink(deps).beat(signal);
  const beat = plane.calls.at(-1)!;
  assert.equal(beat.path, `/v1/hosts/${HOST_ID}/heartbeat`);
  assert.deepEqual(beat.body, {
    load: { cpus: 0.5, memory_mb_used: 10, disk_mb_free: 20, sandboxes: 1 },
    snapshots: { compat: "abc-tsc2000000", store_id: "store-1" },
    digest: digestOfSandboxes([{ id: "sb1", status: "running", generation: 3n }]),
    event_log_id: "log-1",
    last_event_number: 9,
  });
  assert.deepEqual(acknowledged, [4n]);
});

test("a number of another log is not acknowledged", async () => {
  await register();
  plane.acknowledged = 10;
  await new ControlPlaneLink(deps).beat(signal);
  assert.deepEqual(acknowledged, []);
});

test("the access token is renewed at 80 % of its life, and the new one is used at once", async () => {
  await register();
  const link = new ControlPlaneLink(deps);
  nowMs = 790_000;
  await link.beat(signal);
  nowMs = 801_000;
  await link.beat(signal);
  assert.deepEqual(plane.paths(), ["register", "heartbeat", "refresh", "heartbeat"]);
  assert.equal(plane.calls.at(-1)!.authorization, `Bearer ${store.current!.accessToken}`);
  assert.notEqual(store.current!.refreshToken, "refresh-0");
});

test("a refused access token is renewed and the heartbeat sent again", async () => {
  await register();
  plane.accepts.clear();
  await new ControlPlaneLink(deps).beat(signal);
  assert.deepEqual(plane.paths(), ["register", "heartbeat", "refresh", "heartbeat"]);
  assert.equal(pauses, 0);
});

test("an agent that dies at any line of an exchange is not locked out", async () => {
  const names = [...REGISTER_FAILPOINTS, ...LINK_FAILPOINTS].flatMap((name) => [
    `${name}.before`,
    `${name}.after`,
  ]);
  plane.acknowledged = 4;
  for (const name of names.filter((name) => name.startsWith("register"))) {
    await store.forget();
    plane.spentWith = undefined;
    failAt = name;
    await assert.rejects(register(), /died at/);
    failAt = undefined;
    store = await CredentialStore.open(dir);
    await register();
    assert.equal(store.current?.hostId, HOST_ID, name);
  }
  for (const name of names.filter((name) => !name.startsWith("register"))) {
    plane.accepts.clear();
    failAt = name;
    await new ControlPlaneLink({ ...deps, store }).beat(signal);
    failAt = undefined;
    // Started again: only what is on disk is known.
    store = await CredentialStore.open(dir);
    const link = new ControlPlaneLink({ ...deps, store });
    await link.beat(signal);
    assert.equal(plane.paths().at(-1), "heartbeat", name);
    assert.equal(link.isLost, false, name);
  }
  assert.deepEqual([...reached].sort(), names.sort());
  assert.equal(pauses, 0);
});

test("a refused refresh pauses everything at once, again while it lasts, and trust may come back", async () => {
  await register();
  plane.accepts.clear();
  const { family } = plane;
  plane.family = [];
  const link = new ControlPlaneLink(deps);
  await link.beat(signal);
  assert.equal(link.isLost, true);
  await expect.poll(() => pauses).toBe(1);
  await link.beat(signal);
  await expect.poll(() => pauses).toBe(2);
  plane.family = family;
  await link.beat(signal);
  assert.equal(link.isLost, false);
  assert.equal(pauses, 2);
});

test("only a statement that the control plane signed for this host ends it; else everything is paused", async () => {
  await register();
  plane.accepts.clear();
  plane.family = [];
  const stranger = generateKeyPairSync("ed25519").privateKey;
  const now = () => Date.now();
  const other = "host-zzzzzzzzzzzzzzzzzzzz" as HostId;
  const good = await signEndHost({ signingKey: privateKey }, HOST_ID as HostId, now());
  const cases: Record<string, string | undefined> = {
    "no proof": undefined,
    forged: await signEndHost({ signingKey: stranger }, HOST_ID as HostId, now()),
    "for another host": await signEndHost({ signingKey: privateKey }, other, now()),
    old: await signEndHost({ signingKey: privateKey }, HOST_ID as HostId, now() - 125_000),
    "a command's token": await commandTokens({ signingKey: privateKey } as never, now)(HOST_ID as HostId),
    "no token at all": "deleted",
    "its own access token": store.current!.accessToken,
  };
  for (const [name, proof] of Object.entries(cases)) {
    pauses = 0;
    plane.hostEnd = { reason: "host_deleted", ...(proof !== undefined && { proof }) };
    const link = new ControlPlaneLink(deps);
    await link.beat(signal);
    assert.equal(link.isLost, true, name);
    await expect.poll(() => pauses).toBe(1);
    assert.equal(ends, 0, name);
  }
  plane.hostEnd = { reason: "host_deleted", proof: good };
  plane.calls = [];
  await new ControlPlaneLink(deps).beat(signal);
  assert.equal(ends, 1);
  assert.deepEqual(plane.paths(), ["heartbeat"]);
});

test("a refusal of the refresh may bring the proof too", async () => {
  await register();
  plane.family = [];
  const proof = await signEndHost({ signingKey: privateKey }, HOST_ID as HostId, Date.now() + 900_000);
  plane.hostEnd = { reason: "host_deleted", proof };
  nowMs = 900_000; // the access token is due
  await new ControlPlaneLink(deps).beat(signal);
  assert.equal(ends, 1);
  assert.deepEqual(plane.paths(), ["register", "refresh"]);
});

test("a revoked host pauses everything, says what to do, and serves again once it is trusted", async () => {
  await register();
  plane.accepts.clear();
  const { family } = plane;
  plane.family = [];
  plane.hostEnd = { reason: "host_revoked" };
  const words: string[] = [];
  deps.logger = { ...deps.logger, error: (_facts, message) => void words.push(message) };
  const link = new ControlPlaneLink(deps);
  await link.beat(signal);
  await link.beat(signal);
  assert.equal(link.isLost, true);
  assert.deepEqual(words, [
    "this host's credentials were revoked; start the agent with a new registration token: pausing all sandboxes",
  ]);
  plane.family = family;
  await link.beat(signal);
  assert.equal(link.isLost, false);
  assert.equal(ends, 0);
});

test("silence of any kind pauses everything when it lasts, and not before", async () => {
  await register();
  for (const kind of ["hang", "garbage", "endless", 500] as const) {
    pauses = 0;
    nowMs = 0;
    plane.fails = kind;
    const link = new ControlPlaneLink(deps);
    nowMs = 299_000;
    await link.beat(signal);
    assert.equal(link.isLost, false, String(kind));
    nowMs = 300_000;
    await link.beat(signal);
    assert.equal(link.isLost, true, String(kind));
    await expect.poll(() => pauses).toBe(1);
  }
});

test("a limit of 0 means never, and a renewal that fails leaves the present token in use", async () => {
  await register();
  deps = { ...deps, intervals: { heartbeatMs: 30_000, lostAfterMs: 0 } };
  const link = new ControlPlaneLink(deps);
  plane.fails = 500;
  nowMs = 900_000;
  await link.beat(signal);
  assert.equal(link.isLost, false);
  assert.deepEqual(plane.paths(), ["register", "refresh", "heartbeat"]);
});

test("running beats until it is told to stop", async () => {
  await register();
  const stop = new AbortController();
  const running = new ControlPlaneLink({
    ...deps,
    clock: systemClock,
    intervals: { heartbeatMs: 5, lostAfterMs: 0 },
  }).run(stop.signal);
  await expect.poll(() => plane.calls.length).toBeGreaterThan(3);
  stop.abort();
  await running;
});
