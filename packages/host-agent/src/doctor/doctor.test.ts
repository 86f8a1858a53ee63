import { strict as assert } from "node:assert";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test } from "vitest";
import { diagnose } from "./doctor.ts";
import type { Probe, Verdict } from "./doctor.ts";
import { hostProbes } from "./host-probes.ts";
import { renderDiagnosis } from "./render.ts";

const { signal } = new AbortController();
const probe = (area: string, verdict: Verdict, extra: { secure?: boolean } = {}): Probe => ({
  area,
  name: `${area}-driver`,
  required: true,
  run: async () => ({ verdict, detail: "words", ...extra }),
});
const run = (probes: Probe[]) => diagnose(probes, { probeTimeoutMs: 50, signal });

test("one working driver of each kind is enough", async () => {
  const good = await run([
    probe("vmm", "fails"),
    probe("vmm", "works", { secure: true }),
    probe("network", "limited"),
  ]);
  assert.deepEqual([good.ok, good.secure, good.advice], [true, true, []]);
});

test("a kind without a working driver is named", async () => {
  const bad = await run([probe("vmm", "works"), probe("network", "fails")]);
  assert.equal(bad.ok, false);
  assert.match(bad.advice[0]!, /nothing works for network/);
});

test("a host that emulates is not for hostile tenants, and that is said", async () => {
  const emulated = await run([probe("vmm", "works", { secure: false })]);
  assert.equal(emulated.secure, false);
  assert.match(emulated.advice.join(), /hostile tenants/);
});

test("a probe that throws or hangs is a finding, not the end", async () => {
  const { ok, findings } = await run([
    { ...probe("a", "works"), run: () => Promise.reject(new Error("boom")) },
    { ...probe("b", "works"), run: () => new Promise(() => undefined) },
  ]);
  assert.equal(ok, false);
  assert.deepEqual(
    findings.map(({ verdict, detail }) => `${verdict}: ${detail}`),
    ["fails: boom", "fails: the probe did not end in time"],
  );
});

test("the table lines up and has colour only where asked", async () => {
  const diagnosis = await run([probe("vmm", "works", { secure: true }), probe("network", "fails")]);
  assert.equal(
    renderDiagnosis(diagnosis, { color: false }),
    [
      "vmm      vmm-driver      works  words",
      "network  network-driver  fails  words",
      "",
      "No sandbox can run on this host: nothing works for network.",
      "",
    ].join("\n"),
  );
  assert(renderDiagnosis(diagnosis, { color: true }).includes("\u001b[31mfails"));
});

test("the machine's own facts can be told", async () => {
  const dataDir = join(tmpdir(), `rookery-doctor-${process.pid}`);
  const { findings } = await diagnose(hostProbes({ dataDir, uid: process.getuid?.() }), {
    probeTimeoutMs: 5_000,
    signal,
  });
  assert(findings.every(({ detail }) => detail !== ""));
  assert.equal(findings.find(({ name }) => name === "system")?.verdict, "works");
});
