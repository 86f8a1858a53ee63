/** The agent's RPC server over a fake sandbox manager, and a client as its control plane is one. */
import { strict as assert } from "node:assert";
import { generateKeyPairSync } from "node:crypto";
import type { Client } from "@connectrpc/connect";
import { ConnectError, createClient } from "@connectrpc/connect";
import { createConnectTransport } from "@connectrpc/connect-node";
import { ErrorInfoSchema, HostAgentService, TimeoutAction, TimeoutMode } from "@rookery/protocol/hostagent";
import { SignJWT } from "jose";
import { EnvdClient } from "../../guest/envd-client.ts";
import { GUEST_LIMITS } from "../../guest/limits.ts";
import { systemClock } from "../../sandbox-manager/clock.ts";
import type { Trust } from "../auth.ts";
import { startRpcServer, type RpcServer } from "../server.ts";
import { fakeOperations, type FakeOperations } from "./fake-operations.ts";

export const ID = "sbabcdefghijklmnopqr";
const { publicKey, privateKey } = generateKeyPairSync("ed25519");
export const controlPlaneKey = privateKey;
export const spki = publicKey.export({ format: "der", type: "spki" }).toString("base64");
export const registered: Trust = { hostId: "host-1", clusterId: "cluster-1", controlPlaneKey: spki };

/** A token of the control plane for this host. */
export const token = (claims: Record<string, unknown> = {}, lifeSec = 60): Promise<string> =>
  new SignJWT({ iss: "rookery-control-plane", aud: "host-1", ...claims })
    .setProtectedHeader({ alg: "EdDSA" })
    .setIssuedAt()
    .setExpirationTime(Math.floor(Date.now() / 1000) + lifeSec)
    .sign(privateKey);

export interface RpcRig extends AsyncDisposable {
  /** Whom the agent obeys. */
  trust: Trust | undefined;
  /** The header that the client sends. */
  authorization: string;
  /** How often the host was ended. */
  ends: number;
  readonly lines: { level: string; facts: Record<string, unknown> }[];
  readonly operations: FakeOperations;
  readonly envd: EnvdClient;
  readonly server: RpcServer;
  readonly client: Client<typeof HostAgentService>;
}

export async function openRig(): Promise<RpcRig> {
  const operations = fakeOperations();
  const envd = new EnvdClient({ ...GUEST_LIMITS, killGraceMs: 200 });
  const lines: RpcRig["lines"] = [];
  const log = (level: string) => (facts: object) => void lines.push({ level, facts: { ...facts } });
  const server = await startRpcServer({
    listen: { host: "127.0.0.1", port: 0 },
    trust: () => rig.trust,
    operations,
    envd,
    endHost: async () => void (rig.ends += 1),
    clock: systemClock,
    logger: { debug: log("debug"), info: log("info"), warn: log("warn"), error: log("error") },
  });
  const client = createClient(
    HostAgentService,
    createConnectTransport({
      baseUrl: `http://127.0.0.1:${server.address.port}`,
      httpVersion: "2",
      useBinaryFormat: true,
      interceptors: [
        (next) => (request) => {
          request.header.set("authorization", rig.authorization);
          return next(request);
        },
      ],
    }),
  );
  const authorization = `Bearer ${await token()}`;
  const rig: RpcRig = {
    ...{ trust: registered, authorization, ends: 0, lines, operations, envd, server, client },
    async [Symbol.asyncDispose]() {
      await server.close(100);
      await envd.close();
    },
  };
  return rig;
}

export const operation = (overrides: object = {}) => ({
  sandboxId: ID,
  generation: 1n,
  deadlineUnixMs: BigInt(Date.now() + 60_000),
  clusterId: "cluster-1",
  ...overrides,
});
export const creation = (overrides: object = {}) => ({
  operation: operation(),
  source: { case: "image" as const, value: "base" },
  vcpus: 1,
  memoryMb: 512,
  diskMb: 4096,
  lifetime: { timeoutSec: 300, onTimeout: TimeoutAction.PAUSE, mode: TimeoutMode.IDLE },
  env: { A: "1" },
  teamId: "team-abcdefghijklmnopqrst",
  envdAccessToken: "secret-token",
  ...overrides,
});

/** The call fails with this code of the table, about this field. */
export async function refused(call: Promise<unknown>, code: string, field?: string): Promise<ConnectError> {
  const error = await call.then(
    () => assert.fail("it was not refused"),
    (cause: unknown) => cause,
  );
  assert(error instanceof ConnectError);
  const [info] = error.findDetails(ErrorInfoSchema);
  assert.equal(info?.code, code, error.message);
  if (field !== undefined) assert.equal(info.details["field"], field);
  return error;
}
