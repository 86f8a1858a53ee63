import assert from "node:assert/strict";
import * as fc from "fast-check";
import { test } from "vitest";
import { digestOfSandboxes } from "./sandbox-digest.ts";
import { SANDBOX_DIGEST_VECTORS } from "./testing/sandbox-digest-vectors.ts";

const anySandbox = fc.record({
  id: fc.stringMatching(/^sb[a-z0-9]{18}$/),
  status: fc.constantFrom("running", "paused", "failed", "starting", "pausing", "resuming", "stopping"),
  generation: fc.bigInt({ min: 1n, max: 2n ** 63n - 1n }),
});
const anySet = fc.uniqueArray(anySandbox, { selector: ({ id }) => id, maxLength: 20 });

test.each(SANDBOX_DIGEST_VECTORS.map((vector) => [vector.name, vector] as const))(
  "the shared vector: %s",
  (_name, { sandboxes, digest }) => assert.equal(digestOfSandboxes(sandboxes), digest),
);

test("no order matters, and work under way counts as nothing", () => {
  fc.assert(
    fc.property(anySet, (sandboxes) => {
      const still = sandboxes.filter(({ status }) => !status.endsWith("ing") || status === "running");
      assert.equal(digestOfSandboxes(sandboxes), digestOfSandboxes(still.toReversed()));
    }),
  );
});

test("one sandbox more or less, of another generation or in another state, shows", () => {
  fc.assert(
    fc.property(anySet, anySandbox, (others, one) => {
      const rest = others.filter(({ id }) => id !== one.id);
      const running = { ...one, status: "running" };
      const digests = [
        digestOfSandboxes(rest),
        digestOfSandboxes([...rest, running]),
        digestOfSandboxes([...rest, { ...running, status: "paused" }]),
        digestOfSandboxes([...rest, { ...running, generation: running.generation + 1n }]),
      ];
      assert.equal(new Set(digests).size, digests.length);
    }),
  );
});
