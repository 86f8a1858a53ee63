/**
 * The store with the real tools. The Debian stage is taken from the image that
 * all suites share, so only the cheap half of a build is done here again.
 */
import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { once } from "node:events";
import { cp, link, mkdir, mkdtemp, readdir, stat, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { afterAll, beforeAll, test } from "vitest";
import { removeTree } from "../host/atomic-file.ts";
import type { ImageProgress } from "./guest-image.ts";
import type { ImageStoreOptions } from "./image-store.ts";
import { openImageStore } from "./image-store.ts";
import { TEST_DATA_DIR, testImage, testImageStoreOptions } from "./testing/test-image.ts";

const IMAGE_TIMEOUT_MS = 170_000;

let dataDir: string;
let options: ImageStoreOptions;
let events: ImageProgress[] = [];

beforeAll(async () => {
  await testImage(AbortSignal.timeout(290_000));
  // Beside the shared one: hard links do not leave a file system.
  dataDir = await mkdtemp(join(TEST_DATA_DIR, "store-"));
  options = {
    ...(await testImageStoreOptions(join(dataDir, "images"))),
    onProgress: (event) => events.push(event),
  };
  const bundle = join(dataDir, "envd");
  await cp(options.envdBundleDir, bundle, { recursive: true });
  await removeTree(options.envdBundleDir);
  options.envdBundleDir = bundle;
  const shared = join(TEST_DATA_DIR, "images");
  for (const stage of (await readdir(shared)).filter((entry) => entry.startsWith(".stage-"))) {
    await mkdir(join(dataDir, "images", stage), { recursive: true });
    for (const file of await readdir(join(shared, stage))) {
      await link(join(shared, stage, file), join(dataDir, "images", stage, file));
    }
  }
}, 300_000);

afterAll(() => removeTree(dataDir));

function stepsSeen(): Set<string> {
  const steps = new Set(events.map(({ step }) => step));
  events = [];
  return steps;
}

async function unfinished(): Promise<string[]> {
  return (await readdir(join(dataDir, "images"))).filter((entry) => entry.startsWith(".build-"));
}

test("an image is built from stages that are there, and is whole", async () => {
  const store = await openImageStore(options);
  const image = await store.ensure("base", AbortSignal.timeout(IMAGE_TIMEOUT_MS));
  const steps = stepsSeen();
  assert.ok(steps.has("root-disk") && !steps.has("debian") && !steps.has("kernel"), [...steps].join(" "));
  const disk = await stat(image.rootDisk.path);
  assert.equal(disk.size, image.rootDisk.sizeBytes);
  assert.equal(disk.mode & 0o777, 0o444);
  assert.ok(disk.blocks * 512 < 500e6, `${disk.blocks * 512} bytes are allocated`);
  assert.deepEqual(await store.list(), [image]);
  assert.deepEqual(await unfinished(), []);
});

test("when nothing changed the image is there within a second, and nothing is run", async () => {
  const ranNothing = await openImageStore({
    ...options,
    run: ([program]) => Promise.reject(new Error(`ran ${program}`)),
  });
  const startedAt = performance.now();
  await ranNothing.ensure("base", AbortSignal.timeout(IMAGE_TIMEOUT_MS));
  const elapsedMs = performance.now() - startedAt;
  console.log(JSON.stringify({ name: "image-ensure", value: Math.round(elapsedMs), unit: "ms" }));
  assert.ok(elapsedMs < 1000, `${elapsedMs} ms`);
  assert.deepEqual(stepsSeen(), new Set(["ready"]));
});

test("an image that was removed is built again, and is the same", async () => {
  const store = await openImageStore(options);
  const [before] = await store.list();
  assert.ok(before);
  await store.remove(before.hash);
  await store.remove(before.hash);
  assert.deepEqual(await store.list(), []);
  const after = await store.ensure("base", AbortSignal.timeout(IMAGE_TIMEOUT_MS));
  assert.equal(after.hash, before.hash);
});

test("another envd is another image, made without asking apt; what a dead build left goes", async () => {
  await mkdir(join(dataDir, "images/.build-dead"));
  await writeFile(join(options.envdBundleDir, "envd.mjs"), "// another\n", { flag: "a" });
  stepsSeen();
  const store = await openImageStore(options);
  await store.ensure("base", AbortSignal.timeout(IMAGE_TIMEOUT_MS));
  assert.equal((await store.list()).length, 2);
  const steps = stepsSeen();
  assert.ok(!steps.has("resolve") && !steps.has("debian"), [...steps].join(" "));
  assert.deepEqual(await unfinished(), []);
});

test("a build that is aborted leaves nothing and says why", async () => {
  await writeFile(join(options.envdBundleDir, "envd.mjs"), "// a third\n", { flag: "a" });
  const abort = new AbortController();
  const store = await openImageStore({
    ...options,
    onProgress: ({ step, fraction }) => {
      if (step === "root-disk" && (fraction ?? 0) > 0) abort.abort(new Error("changed my mind"));
    },
  });
  await assert.rejects(store.ensure("base", abort.signal), /changed my mind/);
  assert.deepEqual(await unfinished(), []);
  assert.equal((await store.list()).length, 2);
});

test("a second builder waits for the lock of the first, and can be called off", async () => {
  const lock = join(dataDir, "images/.lock");
  const holder = spawn("flock", [lock, "sh", "-c", "echo; exec cat"], { stdio: ["pipe", "pipe", "inherit"] });
  try {
    await once(holder.stdout, "data");
    const abort = new AbortController();
    const store = await openImageStore({
      ...options,
      onProgress: ({ step }) => {
        if (step === "wait") abort.abort(new Error("too long"));
      },
    });
    await assert.rejects(store.ensure("base", abort.signal), /too long/);
  } finally {
    holder.stdin.end();
    await once(holder, "close");
  }
  // Nobody holds it now, so the waiting one left nothing that does.
  const free = spawn("flock", ["--nonblock", lock, "true"]);
  assert.deepEqual(await once(free, "close"), [0, null]);
});
