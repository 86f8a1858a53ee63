/**
 * Each failpoint of create, pause, resume, snapshot and destroy, once as an
 * error and once as a SIGKILL of the agent, on real guests under a real control
 * plane: nothing is lost, nothing leaks, and the row says what is.
 *
 * One life reaches every failpoint and so tells their names. All of them, twice,
 * take a quarter of an hour: that is the long form (ROOKERY_LONG=1). Else a
 * sample, another one each day, is taken; that no failpoint is left out is also
 * proven by the agent's own suites over the simulated VMM.
 */
import assert from "node:assert/strict";
import { rmSync, writeFileSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, afterEach, beforeAll, describe, inject, test } from "vitest";
import { eventually } from "./api.ts";
import type { Api, Sandbox } from "./api.ts";
import { takeInventory } from "./host-inventory.ts";
import { isAlive, Product } from "./product.ts";

const SAMPLE = 8;
/** What a test does, and the first words of the failpoints on its way. */
const OPERATIONS: Record<string, readonly string[]> = {
  create: ["create", "created"],
  pause: ["pause", "retire"],
  resume: ["resume", "resumed"],
  "snapshot of a running one": ["snapshot-running", "snapshot-done"],
  "snapshot of a paused one": ["snapshot-paused"],
  destroy: ["destroy"],
};

const product = new Product(inject("product"));
const controlFile = join(product.agentDataDir, "failpoints.json");
const hitsFile = join(product.agentDataDir, "failpoint-hits");
let api: Api;

const arm = (points: Record<string, string>): void => writeFileSync(controlFile, JSON.stringify(points));

beforeAll(() => {
  api = product.api();
});
afterEach(restore);
afterAll(() => {
  rmSync(controlFile, { force: true });
});

describe("a failpoint", () => {
  let names: string[] = [];

  test("is reached by a sandbox's life, whichever it is", async () => {
    arm({});
    rmSync(hitsFile, { force: true });
    for (const operation of Object.keys(OPERATIONS)) await live(operation);
    names = [...new Set(readFileSync(hitsFile, "utf8").trim().split("\n"))].filter(
      (name) => operationOf(name) !== undefined,
    );
    for (const operation of Object.keys(OPERATIONS)) {
      assert.ok(
        names.some((name) => operationOf(name) === operation),
        `no failpoint of ${operation} was reached`,
      );
    }
  });

  for (const action of ["error", "kill"] as const) {
    test(`that ends in ${action === "kill" ? "a SIGKILL" : "an error"} leaves every row true and nothing behind`, async () => {
      const failures: unknown[] = [];
      for (const name of sample(names, action)) {
        try {
          await passes(name, action);
        } catch (cause) {
          // The others are looked at all the same: a run of all of them takes long.
          console.error(`${action} at ${name}`, cause);
          failures.push(new Error(`at ${name} as ${action}`, { cause }));
          await restore();
          if (failures.length === 3) break;
        }
      }
      if (failures.length > 0) throw new AggregateError(failures, failures.map(String).join("; "));
    }, 7_200_000);
  }
});

/** The operation that `name` is a failpoint of, with it armed; afterwards nothing of it is left. */
async function passes(name: string, action: "error" | "kill"): Promise<void> {
  arm({ [name]: `${action}*1` });
  await live(operationOf(name) ?? "", async () => {
    if (action === "error") return;
    await eventually(`the agent died at ${name}`, 30_000, () =>
      isAlive(product.pid("agent")) ? undefined : true,
    );
    await product.restartAgent();
  });
  assert.equal(armedLeft(name), 0, `${name} was not reached as ${action}`);
  await destroyAll();
  await eventually(`nothing is left after ${name} as ${action}`, 30_000, () => {
    const left = takeInventory(product.agentDataDir);
    return left.sandboxDirs.length + left.snapshotDirs.length + left.layerDirs.length === 0
      ? true
      : undefined;
  });
}

/** An agent that lives, no failpoint armed, no sandbox. */
async function restore(): Promise<void> {
  arm({});
  if (!isAlive(product.pid("agent"))) await product.restartAgent();
  await destroyAll();
}

/** One sandbox through one operation; `meanwhile` runs while the operation may be failing. */
async function live(operation: string, meanwhile: () => Promise<void> = async () => {}): Promise<void> {
  if (operation === "create") {
    const [created] = await Promise.all([api.call<Sandbox>("POST", "/v1/sandboxes", {}), meanwhile()]);
    if (created.status === 201) await settledWith(created.body.id, ["running"]);
    else await noneUnsettled();
    return;
  }
  const { id } = await api.create();
  await api.sh(id, `echo ${id} > /tmp/mine`);
  if (operation === "resume" || operation === "snapshot of a paused one") await api.pause(id);
  const snapshots = operation.startsWith("snapshot");
  const name = `fp-${id.slice(2, 12)}`;
  const call = snapshots
    ? api.call("POST", "/v1/snapshots", { sandbox_id: id, name })
    : operation === "destroy"
      ? api.call("DELETE", `/v1/sandboxes/${id}`)
      : api.call("POST", `/v1/sandboxes/${id}/${operation}`);
  const [answer] = await Promise.all([call, meanwhile()]);
  if (operation === "destroy") {
    await settledWith(id, ["stopped", "running"]);
    await api.destroy(id);
    await settledWith(id, ["stopped"]);
    return;
  }
  const row = await settledWith(id, ["running", "paused"]);
  if (row.status === "paused") await api.resume(id);
  assert.equal(await api.sh(id, "cat /tmp/mine"), id, "the sandbox lost its memory or disk");
  if (!snapshots) return;
  if (answer.status === 201) {
    const child = await api.create({ template: name });
    assert.equal(await api.sh(child.id, "cat /tmp/mine"), id);
    await api.destroy(child.id);
    await api.must(204, "DELETE", `/v1/snapshots/${name}`);
  } else {
    // What failed leaves the name free.
    await api.must(201, "POST", "/v1/snapshots", { sandbox_id: id, name });
    await api.must(204, "DELETE", `/v1/snapshots/${name}`);
  }
}

async function settledWith(id: string, statuses: readonly string[]): Promise<Sandbox> {
  return eventually(`${id} is ${statuses.join(" or ")}`, 120_000, async () => {
    const row = await api.get(id);
    return statuses.includes(row.status) ? row : undefined;
  });
}

async function noneUnsettled(): Promise<void> {
  await eventually("no row is under way", 120_000, async () =>
    (await api.live()).every((row) => ["running", "paused"].includes(row.status)) ? true : undefined,
  );
}

async function destroyAll(): Promise<void> {
  await eventually("every sandbox can be destroyed", 120_000, async () => {
    const answers = await Promise.all(
      (await api.live()).map(({ id }) => api.call("DELETE", `/v1/sandboxes/${id}`)),
    );
    return answers.every(({ status }) => status === 204) && (await api.live()).length === 0
      ? true
      : undefined;
  });
}

function operationOf(name: string): string | undefined {
  const [word = ""] = name.split(".");
  return Object.keys(OPERATIONS).find((operation) => OPERATIONS[operation]?.includes(word));
}

function armedLeft(name: string): number {
  const armed = JSON.parse(readFileSync(controlFile, "utf8")) as Record<string, string>;
  return Number(armed[name]?.split("*")[1]);
}

/** All of them, or every n-th from a start that changes with the day. */
function sample(names: readonly string[], action: string): readonly string[] {
  if (process.env["ROOKERY_LONG"]) return names;
  const every = Math.ceil(names.length / SAMPLE);
  const start = (Math.floor(Date.now() / 86_400_000) + (action === "kill" ? 1 : 0)) % every;
  const chosen = names.filter((_, index) => index % every === start);
  console.log(`${action}: ${chosen.join(", ")}`);
  return chosen;
}
