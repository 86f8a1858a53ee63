/** Who may command an agent. */
import { strict as assert } from "node:assert";
import { generateKeyPairSync } from "node:crypto";
import { Code, ConnectError } from "@connectrpc/connect";
import { SandboxPhase } from "@rookery/protocol/hostagent";
import { SignJWT, UnsecuredJWT } from "jose";
import { afterEach, beforeEach, test } from "vitest";
import {
  controlPlaneKey,
  creation,
  ID,
  openRig,
  refused,
  registered,
  token,
  spki,
  type RpcRig,
} from "./testing/rpc-rig.ts";

let rig: RpcRig;
let client: RpcRig["client"];
let operations: RpcRig["operations"];

beforeEach(async () => {
  rig = await openRig();
  ({ client, operations } = rig);
});
afterEach(() => rig[Symbol.asyncDispose]());

test("a stranger is frozen and thawed, and the host is ended, by its own cluster alone", async () => {
  await client.createSandbox(creation());
  const clusterId = "cluster-1";
  const { sandbox: frozen } = await client.freezeSandbox({ sandboxId: ID, clusterId });
  assert.deepEqual([frozen?.phase, frozen?.inMemory, frozen?.strangerForMs], [SandboxPhase.PAUSED, true, 0n]);
  const { sandbox: thawed } = await client.thawSandbox({ sandboxId: ID, clusterId });
  assert.deepEqual(
    [thawed?.phase, thawed?.inMemory, thawed?.strangerForMs],
    [SandboxPhase.RUNNING, false, undefined],
  );
  await client.endHost({ clusterId });
  assert.equal(rig.ends, 1);
  const wrong = { sandboxId: ID, clusterId: "cluster-2" };
  await refused(client.freezeSandbox(wrong), "forbidden");
  await refused(client.thawSandbox(wrong), "forbidden");
  await refused(client.endHost({ clusterId: "cluster-2" }), "forbidden");
  assert.equal(rig.ends, 1);
});

test("forged, expired, unbounded and misdirected tokens are refused", async () => {
  const stranger = generateKeyPairSync("ed25519").privateKey;
  const now = Math.floor(Date.now() / 1000);
  const claims = { iss: "rookery-control-plane", aud: "host-1" };
  const bad: Record<string, string> = {
    forged: await new SignJWT(claims)
      .setProtectedHeader({ alg: "EdDSA" })
      .setIssuedAt()
      .setExpirationTime("60s")
      .sign(stranger),
    expired: await token({}, -61),
    "for another host": await token({ aud: "host-2" }),
    "from another issuer": await token({ iss: "someone" }),
    "without expiry": await new SignJWT(claims)
      .setProtectedHeader({ alg: "EdDSA" })
      .setIssuedAt()
      .sign(controlPlaneKey),
    "issued long ago": await token({}, 60).then(() =>
      new SignJWT(claims)
        .setProtectedHeader({ alg: "EdDSA" })
        .setIssuedAt(now - 4_000)
        .setExpirationTime(now + 60)
        .sign(controlPlaneKey),
    ),
    "for another purpose": await token({ purpose: "end-host" }),
    "alg none": new UnsecuredJWT(claims).setIssuedAt().setExpirationTime("60s").encode(),
    "alg HS256 with the public key": await new SignJWT(claims)
      .setProtectedHeader({ alg: "HS256" })
      .setIssuedAt()
      .setExpirationTime("60s")
      .sign(Buffer.from(spki)),
  };
  for (const [name, text] of Object.entries(bad)) {
    rig.authorization = `Bearer ${text}`;
    const error = await client.getSandbox({ sandboxId: ID }).then(
      () => assert.fail(`a token ${name} was taken`),
      (cause: unknown) => cause,
    );
    assert(error instanceof ConnectError && error.code === Code.Unauthenticated, name);
  }
  rig.authorization = "Basic abc";
  await refused(client.getSandbox({ sandboxId: ID }), "unauthenticated");
  assert.deepEqual(operations.calls, []);
});

test("a token that expired within the leeway still counts", async () => {
  rig.authorization = `Bearer ${await token({}, -30)}`;
  await refused(client.getSandbox({ sandboxId: ID }), "not_found");
});

test("before registration nobody may command, and after a change of key only its owner", async () => {
  rig.trust = undefined;
  await refused(client.getSandbox({ sandboxId: ID }), "unauthenticated");
  rig.trust = registered;
  await refused(client.getSandbox({ sandboxId: ID }), "not_found");
  const other = generateKeyPairSync("ed25519")
    .publicKey.export({ format: "der", type: "spki" })
    .toString("base64");
  rig.trust = { ...registered, controlPlaneKey: other };
  await refused(client.getSandbox({ sandboxId: ID }), "invalid_token");
});
