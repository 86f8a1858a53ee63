import assert from "node:assert/strict";
import { test } from "vitest";
import type { HostRecord } from "../db/hosts.ts";
import type { HostId } from "../model/ids.ts";
import { newScheduler } from "./scheduler.ts";

const small = { memoryMb: 512, diskMb: 4096 };

function host(name: string, facts: Partial<HostRecord> = {}): HostRecord {
  return {
    id: `host-${name}` as HostId,
    name,
    type: "shared",
    status: "online",
    draining: false,
    labels: {},
    memoryMb: 8192,
    diskMb: 100_000,
    cpus: 2,
    drivers: { vmm: "qemu" },
    epoch: 1,
    strangers: 0,
    strangersUntouched: false,
    acknowledgedEvent: 0n,
    createdAt: new Date(0),
    ...facts,
  };
}

test("round-robin asks each host in turn", () => {
  const scheduler = newScheduler("round-robin");
  const hosts = [host("b"), host("c"), host("a")];
  const picked = Array.from({ length: 6 }, () => scheduler.pick(small, hosts)?.name);
  assert.deepEqual(picked, ["a", "b", "c", "a", "b", "c"]);
});

test("round-robin goes on when the host that was asked last is gone", () => {
  const scheduler = newScheduler("round-robin");
  scheduler.pick(small, [host("a"), host("b")]);
  assert.equal(scheduler.pick(small, [host("b"), host("c")])?.name, "b");
  assert.equal(scheduler.pick(small, [host("a"), host("c")])?.name, "c");
});

test("least-loaded picks the host with the smallest part of its memory in use", () => {
  const load = (memoryMbUsed: number) => ({ cpus: 0, memoryMbUsed, diskMbFree: 0, sandboxes: 0 });
  const hosts = [
    host("a", { load: load(4000) }),
    host("b", { load: load(6000), memoryMb: 64_000 }),
    host("c", { load: load(3000) }),
  ];
  assert.equal(newScheduler("least-loaded").pick(small, hosts)?.name, "b");
});

test("least-loaded counts what it placed since a host's last word, and no longer", () => {
  const scheduler = newScheduler("least-loaded");
  const at = (seconds: number, memoryMbUsed: number) => ({
    lastHeartbeatAt: new Date(seconds * 1000),
    load: { cpus: 0, memoryMbUsed, diskMbFree: 0, sandboxes: 0 },
  });
  const burst = (hosts: HostRecord[]) => {
    const names = Array.from({ length: 6 }, () => scheduler.pick(small, hosts)?.name);
    return Object.fromEntries(["a", "b", "c"].map((name) => [name, names.filter((n) => n === name).length]));
  };
  const hosts = [host("a", at(1, 0)), host("b", at(1, 0)), host("c", at(1, 512))];
  assert.deepEqual(burst(hosts), { a: 3, b: 2, c: 1 });
  const beaten = [host("a", at(2, 4096)), host("b", at(2, 0)), host("c", at(2, 4096))];
  assert.deepEqual(burst(beaten), { a: 0, b: 6, c: 0 });
});

test("no sandbox goes to a host that is silent, draining, too small, of another VMM, or without the snapshot", () => {
  const scheduler = newScheduler("round-robin");
  const refuses = (facts: Partial<HostRecord>, request = {}) =>
    assert.equal(scheduler.pick({ ...small, ...request }, [host("a", facts)]), undefined);
  refuses({ status: "unreachable" });
  refuses({ status: "pending" });
  refuses({ draining: true });
  refuses({ memoryMb: 511 });
  refuses({ diskMb: 4095 });
  refuses({}, { vmm: "firecracker" });
  refuses({}, { snapshot: { hostIds: ["host-b" as HostId] } });
});

test("a snapshot goes to who has it, else to who can fetch and load it", () => {
  const scheduler = newScheduler("least-loaded");
  const compat = "x-tsc2000000";
  const snapshot = { hostIds: ["host-a" as HostId], compat, storeId: "s" };
  const shares = { snapshotCompat: compat, storeId: "s" };
  const pick = (...hosts: HostRecord[]) => scheduler.pick({ ...small, snapshot }, hosts)?.name;
  const busy = { load: { cpus: 0, memoryMbUsed: 8000, diskMbFree: 0, sandboxes: 9 } };
  assert.equal(pick(host("b", shares), host("a", busy)), "a");
  assert.equal(pick(host("b", shares), host("a", { ...busy, draining: true })), "b");
  assert.equal(pick(host("b", { ...shares, snapshotCompat: "x-tsc2000001" })), "b");
  assert.equal(pick(host("b", { ...shares, snapshotCompat: "x-tsc2400000" })), undefined);
  assert.equal(pick(host("b", { ...shares, storeId: "t" })), undefined);
  assert.equal(pick(host("b", { storeId: "s" })), undefined);
  assert.equal(pick(host("a", { snapshotCompat: "y" })), undefined, "its VMM was exchanged since");
});
