/** The agent program on a simulated host: whole, several in one process, and never taken for a real one. */
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { createServer } from "node:http";
import type { Server } from "node:http";
import { tmpdir } from "node:os";
import { generateKeyPairSync } from "node:crypto";
import { join } from "node:path";
import { pino } from "pino";
import { afterEach, beforeEach, expect, test, vi } from "vitest";
import { readConfig } from "../config.ts";
import { diagnose } from "../doctor/doctor.ts";
import { driverProbes, openDrivers } from "../drivers.ts";
import { instanceTagOf } from "../guest-network/slots.ts";
import type { Command } from "../guest/process-calls.ts";
import type { SandboxId } from "../ids.ts";
import { openAgent } from "../open-agent.ts";
import { operationOf, sandboxId, specOf } from "../sandbox-manager/testing/simulated-machine.ts";
import { systemClock } from "../sandbox-manager/clock.ts";
import type { Clock } from "../sandbox-manager/clock.ts";
import { memoryProcessTable } from "../vmm/simulated-processes.ts";
import { seededRandom } from "./seeded-random.ts";
import { startSimulatedAgent } from "./start-simulated-agent.ts";
import type { SimulatedAgent, SimulatedAgentOptions } from "./start-simulated-agent.ts";
import { drawMs, MEASURED } from "./timings.ts";
import type { SimulatedOperation } from "./timings.ts";

vi.setConfig({ testTimeout: 60_000 });

const never = new AbortController().signal;
const logger = pino({ level: "silent" });
let root: string;
let plane: Server;
let url: string;
/** Bodies of registrations, by host id. */
let registered: Map<string, { drivers: Record<string, string>; address: string }>;
let heartbeats: Map<string, number>;

/** Takes any token, and answers as API.md has it. */
beforeEach(async () => {
  root = mkdtempSync(join(tmpdir(), "rookery-simulated-"));
  registered = new Map();
  heartbeats = new Map();
  const { publicKey } = generateKeyPairSync("ed25519");
  plane = createServer((request, response) => {
    const parts: Buffer[] = [];
    request.on("data", (part: Buffer) => parts.push(part));
    request.on("end", () => {
      const answer = (body: object) => response.end(JSON.stringify(body));
      const beat = /^\/v1\/hosts\/([^/]+)\/heartbeat$/.exec(request.url!)?.[1];
      if (beat !== undefined) {
        heartbeats.set(beat, (heartbeats.get(beat) ?? 0) + 1);
        return answer({ acknowledged_event: 0 });
      }
      const host_id = `host-${String(registered.size).padStart(20, "0")}`;
      registered.set(
        host_id,
        JSON.parse(Buffer.concat(parts).toString()) as {
          drivers: Record<string, string>;
          address: string;
        },
      );
      return answer({
        host_id,
        cluster_id: "cluster-1",
        access_token: "access",
        refresh_token: "refresh",
        control_plane_key: publicKey.export({ format: "der", type: "spki" }).toString("base64"),
      });
    });
  });
  await new Promise<void>((resolve) => plane.listen(0, "127.0.0.1", resolve));
  url = `http://127.0.0.1:${(plane.address() as { port: number }).port}`;
});
afterEach(async () => {
  plane.closeAllConnections();
  await new Promise((resolve) => plane.close(resolve));
  rmSync(root, { recursive: true, force: true });
});

/** A template takes seconds to boot; here a second is a tenth of one. */
const fast: Clock = {
  ...systemClock,
  after: (delayMs, run) => systemClock.after(delayMs / 10, run),
};

/** However busy this machine is. */
const within = (id: SandboxId, generation: number) => operationOf(id, generation, Date.now() + 3_600_000);

const start = (name: string, options: Partial<SimulatedAgentOptions> = {}): Promise<SimulatedAgent> =>
  startSimulatedAgent({
    dataDir: join(root, name),
    controlPlaneUrl: url,
    registrationToken: `token-of-${name}`,
    clock: fast,
    ...options,
  });

function run({ agent }: SimulatedAgent, id: SandboxId, cmd: string): Promise<string> {
  const command: Command = { cmd, args: [], shell: true, env: {}, stdin: new Uint8Array(), timeoutMs: 0 };
  return agent.manager.withEnvd(id, async (target, signal) => {
    const { stdout } = await agent.envd.exec(target, command, { maxOutputBytes: 1000 }, signal);
    return Buffer.from(stdout).toString();
  });
}

test("several agents live in one process, and share nothing", async () => {
  await using first = await start("first", { seed: 1 });
  await using second = await start("second", { seed: 2 });
  expect(first.hostId).not.toBe(second.hostId);
  expect(first.address.port).not.toBe(second.address.port);
  for (const { hostId, address } of [first, second]) {
    const { drivers, address: told } = registered.get(hostId)!;
    expect(drivers).toEqual({
      vmm: "simulated",
      acceleration: "none",
      root_disk: "simulated",
      network: "simulated",
    });
    expect(told).toBe(`127.0.0.1:${address.port}`);
    await expect.poll(() => heartbeats.get(hostId) ?? 0, { timeout: 10_000 }).toBeGreaterThan(2);
  }
  const id = sandboxId("one");
  await first.agent.manager.create(specOf(id), within(id, 1));
  expect((await second.agent.manager.list({ limit: 10 })).items).toEqual([]);
  expect(second.processes.all()).toEqual([]);
  await expect(run(second, id, "true")).rejects.toMatchObject({ code: "not_found" });
  expect(await run(first, id, "uname -a")).toContain("simulated");
  expect(await run(first, id, "echo hello")).toBe("hello\n");
});

test("what a guest remembers survives pause and resume, and the agent's end", async () => {
  const processes = memoryProcessTable();
  const id = sandboxId("one");
  const path = { path: "/tmp/note" };
  const before = await start("host", { processes });
  await before.agent.manager.create(specOf(id), within(id, 1));
  const token = await before.agent.manager.withEnvd(id, async (target, signal) => {
    const content = (async function* () {
      yield Buffer.from("remember me");
    })();
    await before.agent.envd.writeFile(target, path, content, signal);
    return target.accessToken;
  });
  await before.agent.manager.pause(within(id, 2));
  expect(processes.all()).toEqual([]);
  await before.agent.manager.resume(within(id, 3));
  await before.stop();
  // It has its credentials, and needs no token any more.
  await using after = await start("host", { processes, registrationToken: undefined });
  expect(after.hostId).toBe(before.hostId);
  expect((await after.agent.manager.get(id)).phase).toBe("running");
  expect(await run(after, id, "cat /tmp/note")).toBe("remember me");
  const wrong = { host: "", port: after.processes.all()[0]!.place.nic.kind === "simulated" ? 20_000 : 0 };
  await expect(
    Array.fromAsync(after.agent.envd.readFile({ ...wrong, accessToken: `${token}x` }, path, never)),
  ).rejects.toMatchObject({ code: "guest_error" });
});

test("a guest takes notes, says whose it is, and may end by itself", async () => {
  await using host = await start("host");
  const id = sandboxId("one");
  await host.agent.manager.create(specOf(id), within(id, 1));
  expect(await run(host, id, "note word")).toBe(id);
  expect(host.processes.all()[0]!.guest.memory["note-word"]).toBe(id);
  await expect(run(host, id, "panic")).rejects.toMatchObject({ code: "guest_error" });
  await expect.poll(async () => (await host.agent.manager.get(id)).phase, { timeout: 10_000 }).toBe("failed");
  expect(host.processes.all()).toEqual([]);
});

test("another boot id in the data directory is a reboot", async () => {
  const id = sandboxId("one");
  const processes = memoryProcessTable();
  const before = await start("host", { processes });
  await before.agent.manager.create(specOf(id), within(id, 1));
  await before.stop();
  writeFileSync(join(root, "host", "simulated", "boot-id"), "another\n");
  await using after = await start("host", { processes });
  expect((await after.agent.manager.get(id)).exit?.code).toBe("host_restarted");
});

test("a booted machine has none of its guests left", async () => {
  const id = sandboxId("one");
  const before = await start("host");
  await before.agent.manager.create(specOf(id), within(id, 1));
  await before.stop();
  await using after = await start("host", { bootId: "another" });
  const { phase, exit } = await after.agent.manager.get(id);
  expect(phase).toBe("failed");
  expect(exit?.code).toBe("host_restarted");
});

test("real and simulated agents keep out of each other's data", async () => {
  const dataDir = join(root, "real");
  mkdirSync(join(dataDir, "sandboxes", "sbaaaaaaaaaaaaaaaaaa"), { recursive: true });
  await expect(start("real")).rejects.toMatchObject({ code: "wrong_state" });
  await (await start("simulated")).stop();
  const config = readConfig({}, { data: join(root, "simulated") }, root);
  await expect(openAgent({ config, logger, signal: never })).rejects.toMatchObject({ code: "wrong_state" });
});

test("nothing but its name chooses a simulated VMM, and nothing else goes with it", async () => {
  const of = (environment: Record<string, string | undefined>) =>
    readConfig(environment, { data: root }, root);
  const tag = await instanceTagOf(root);
  const { vmm, rootDisk, network } = await openDrivers(of({}), tag);
  expect([...vmm, ...rootDisk, ...network].map(({ kind }) => kind)).not.toContain("simulated");
  expect(of({ ROOKERY_VMM: "simulated" }).drivers).toEqual({
    vmm: "simulated",
    rootDisk: "simulated",
    network: "simulated",
  });
  for (const mixed of [
    { ROOKERY_VMM: "simulated", ROOKERY_NETWORK: "netns" },
    { ROOKERY_VMM: "simulated", ROOKERY_ROOT_DISK: "qcow2" },
    { ROOKERY_VMM: "qemu", ROOKERY_NETWORK: "simulated" },
    { ROOKERY_ROOT_DISK: "simulated" },
  ]) {
    expect(() => of(mixed)).toThrow("simulated");
  }
});

test("the doctor says that nothing runs on it", async () => {
  const config = readConfig({ ROOKERY_VMM: "simulated" }, { data: root }, root);
  const probes = driverProbes(await openDrivers(config, await instanceTagOf(root)));
  const { findings, advice, secure } = await diagnose(probes, { probeTimeoutMs: 30_000, signal: never });
  for (const area of ["vmm", "root disk", "network"]) {
    expect(findings.filter((finding) => finding.area === area)).toEqual([
      { area, name: "simulated", verdict: "limited", detail: expect.stringContaining("simulated") },
    ]);
  }
  expect(secure).toBe(false);
  expect(advice.join()).toContain("SIMULATED");
});

test("timings are log-normal around what was measured, and replay from their seed", () => {
  for (const operation of Object.keys(MEASURED) as SimulatedOperation[]) {
    const { medianMs, sigma } = MEASURED[operation];
    const draw = (seed: number) => {
      const random = seededRandom(seed);
      return Array.from({ length: 10_001 }, () => drawMs(operation, random));
    };
    expect(draw(7)).toEqual(draw(7));
    expect(draw(7)).not.toEqual(draw(8));
    const logs = draw(7)
      .map((ms) => Math.log(ms / medianMs) / sigma)
      .sort((a, b) => a - b);
    // Of the standard normal: median 0, quartiles at 0.674.
    expect(logs[5_000]).toBeCloseTo(0, 1);
    expect(logs[2_500]).toBeCloseTo(-0.674, 1);
    expect(logs[7_500]).toBeCloseTo(0.674, 1);
  }
});
