import { strict as assert } from "node:assert";
import { spawn } from "node:child_process";
import { once } from "node:events";
import { mkdtemp } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, test } from "vitest";
import { removeTree } from "./atomic-file.ts";
import { DataLock } from "./data-lock.ts";

let dir: string;
beforeEach(async () => {
  dir = await mkdtemp(join(tmpdir(), "rookery-lock-"));
});
afterEach(() => removeTree(dir));

const HOLDER = `
  import { DataLock } from ${JSON.stringify(new URL("data-lock.ts", import.meta.url).href)};
  globalThis.lock = await DataLock.acquire(process.argv[1]);
  console.log("held");
  setInterval(() => {}, 1000);
`;

async function startHolder() {
  const child = spawn(process.execPath, ["--input-type=module", "-e", HOLDER, dir], {
    stdio: ["ignore", "pipe", "inherit"],
  });
  await once(child.stdout, "data");
  return child;
}

test("a second process is refused and told who has the lock", async () => {
  const holder = await startHolder();
  try {
    await assert.rejects(DataLock.acquire(dir), new RegExp(`in use by process ${holder.pid}`));
  } finally {
    holder.kill("SIGKILL");
    await once(holder, "exit");
  }
  await using _lock = await DataLock.acquire(dir);
});

test("who must have it ends the holder", async () => {
  const holder = await startHolder();
  const gone = once(holder, "exit");
  await using _lock = await DataLock.seize(dir, 5_000);
  assert.deepEqual(await gone, [null, "SIGTERM"]);
});

test("a lock given back can be taken again", async () => {
  {
    await using _first = await DataLock.acquire(dir);
  }
  await using _second = await DataLock.acquire(dir);
});
