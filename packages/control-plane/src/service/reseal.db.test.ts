import assert from "node:assert/strict";
import { randomBytes } from "node:crypto";
import { beforeAll, test } from "vitest";
import { openCluster } from "../hosts/cluster.ts";
import { newSealer } from "../model/sealer.ts";
import { idempotent } from "./idempotent.ts";
import { reseal } from "./reseal.ts";
import { type TestPlane, useTestPlane } from "./testing/test-plane.ts";

const openPlane = useTestPlane();
let plane: TestPlane;

beforeAll(async () => {
  plane = await openPlane();
});

const OLD = "an old key of thirty-two characters";
const NEXT = "the next key of thirty-two characters";

test("with both keys all is sealed anew, and the old one can go", async () => {
  const { teamId } = await plane.newCaller();
  const { db, ids } = plane.deps;
  // The plane's own key made the cluster: bring it to the old one first.
  const own = "a key of thirty-two characters..";
  await reseal(db, newSealer(OLD, randomBytes, [own]));
  const ask = (secrets: [string, ...string[]]) =>
    idempotent(
      { ...plane.deps, sealer: newSealer(secrets[0], randomBytes, secrets.slice(1)) },
      { teamId, key: "k", fingerprint: "f" },
      { make: async () => 1, answer: () => ({ status: 201, body: { secret: "shown once" } }) },
    );
  await ask([OLD]);

  await assert.rejects(reseal(db, newSealer(NEXT, randomBytes)), /no key of ours/);
  assert.equal((await ask([OLD])).status, 201, "a reseal that was refused changed nothing");

  assert.deepEqual(await reseal(db, newSealer(NEXT, randomBytes, [OLD])), { answers: 1 });
  assert.deepEqual(await ask([NEXT]), { status: 201, body: { secret: "shown once" } });
  await assert.rejects(ask([OLD]), /no key of ours/);
  const cluster = await openCluster(db, { sealer: newSealer(NEXT, randomBytes), ids, random: randomBytes });
  assert.equal(cluster.publicKey, plane.deps.cluster.publicKey, "hosts still know us");
});
