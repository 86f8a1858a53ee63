/**
 * `npm run bench -- NAME…`: tti, tti-burst, exec, pause-resume, upload, clone, or all
 * of these; or fleet-scale, alone, with options of its own.
 *
 * One JSON object per line; medians of at least seven runs that take turns with
 * their floor. A product of the bench's own is started and stopped; nothing else
 * should keep the machine busy meanwhile.
 */
import { randomBytes } from "node:crypto";
import { mkdirSync, mkdtempSync, readFileSync, readdirSync, rmSync, statSync } from "node:fs";
import { join } from "node:path";
import { eventually } from "../test/api.ts";
import type { Api } from "../test/api.ts";
import { vmmPids } from "../test/host-inventory.ts";
import { freePort, Product, repoDir } from "../test/product.ts";
import { HandClone, unpackWarmImage } from "./floor/hand-clone.ts";
import type { WarmFiles } from "./floor/hand-clone.ts";
import { fleetScale } from "./fleet-scale.ts";
import { contest, median, print, timed } from "./measure.ts";

/** Waiting clones, on both sides. */
const POOL = 4;
const BURST = 20;
/** 10 MiB of a guest's memory. */
const DIRTY = "head -c 10485760 /dev/urandom > /dev/shm/dirty";

interface Bench {
  product: Product;
  api: Api;
  warm: WarmFiles;
  workDir: string;
}

const BENCHES: Record<string, (bench: Bench) => Promise<void>> = {
  tti,
  "tti-burst": ttiBurst,
  exec,
  "pause-resume": pauseResume,
  upload,
  clone,
};

const names = process.argv.slice(2);
if (names[0] === "fleet-scale") {
  await fleetScale(names.slice(1));
  process.exit();
}
const wanted = names.length === 0 || names.includes("all") ? Object.keys(BENCHES) : names;
for (const name of wanted) {
  if (!(name in BENCHES)) {
    console.error(`No bench ${name}; there are ${Object.keys(BENCHES).join(", ")}.`);
    process.exit(2);
  }
}

mkdirSync(join(repoDir, ".rookery"), { recursive: true });
const dataDir = mkdtempSync(join(repoDir, ".rookery", "bench-"));
const product = new Product({
  dataDir,
  port: await freePort(),
  agentPort: await freePort(),
  env: { ROOKERY_POOL: String(POOL), ROOKERY_IMAGE_DIR: join(repoDir, ".rookery", "test", "images") },
});
try {
  await product.up();
  const workDir = join(dataDir, "floor");
  mkdirSync(workDir);
  const warmDir = join(product.agentDataDir, "warm");
  const [key] = readdirSync(warmDir).filter((name) => /^[0-9a-f]{64}$/.test(name));
  if (key === undefined) throw new Error("the product has no warm image");
  const bench = { product, api: product.api(), warm: unpackWarmImage(join(warmDir, key), workDir), workDir };
  for (const name of wanted) await BENCHES[name]?.(bench);
} finally {
  await product.remove();
}

/** The product's pool is full and at rest. */
async function poolIsFull({ product: { agentDataDir } }: Bench): Promise<void> {
  let same = 0;
  await eventually("the pool is full", 60_000, () => {
    same = vmmPids(agentDataDir).length === POOL ? same + 1 : 0;
    return same >= 10 ? true : undefined;
  });
}

/** From the call to the first answer of a command inside. */
async function tti(bench: Bench): Promise<void> {
  const { api, warm, workDir } = bench;
  const waiting: HandClone[] = [];
  const fill = async (): Promise<void> => {
    while (waiting.length < POOL) waiting.push(await HandClone.spawn(warm, workDir));
  };
  try {
    const measured = await contest({
      name: "tti",
      unit: "ms",
      runs: 15,
      product: async () => {
        await poolIsFull(bench);
        let id = "";
        const ms = await timed(async () => {
          ({ id } = await api.create());
          await api.exec(id, { cmd: "true" });
        });
        await api.destroy(id);
        return ms;
      },
      floor: async () => {
        await fill();
        await poolIsFull(bench);
        const clone = waiting.shift()!;
        const ms = await timed(async () => {
          await clone.thaw();
          await clone.init();
          await clone.exec("true", []);
        });
        await clone.dispose();
        return ms;
      },
    });
    print(measured);
  } finally {
    await Promise.all(waiting.map((clone) => clone.dispose()));
  }
}

/** Until the last of twenty that were asked for at once has answered. */
async function ttiBurst(bench: Bench): Promise<void> {
  const { api, warm, workDir } = bench;
  const measured = await contest({
    name: "tti-burst",
    unit: "ms",
    runs: 7,
    product: async () => {
      await poolIsFull(bench);
      const ids: string[] = [];
      const ms = await timed(() =>
        Promise.all(
          Array.from({ length: BURST }, async () => {
            const { id } = await api.create();
            ids.push(id);
            await api.exec(id, { cmd: "true" });
          }),
        ),
      );
      await Promise.all(ids.map((id) => api.destroy(id)));
      return ms;
    },
    floor: async () => {
      const clones: HandClone[] = [];
      for (let index = 0; index < POOL; index += 1) clones.push(await HandClone.spawn(warm, workDir));
      await poolIsFull(bench);
      const started = [...clones];
      const ms = await timed(async () => {
        // As many at a time as there are waiting clones: more only get in each other's way on few cores.
        let left = BURST;
        await Promise.all(
          Array.from({ length: POOL }, async () => {
            while (left > 0) {
              left -= 1;
              let clone = clones.shift();
              if (clone === undefined) {
                clone = await HandClone.spawn(warm, workDir);
                started.push(clone);
              }
              await clone.thaw();
              await clone.init();
              await clone.exec("true", []);
            }
          }),
        );
      });
      await Promise.all(started.map((clone) => clone.dispose()));
      return ms;
    },
  });
  print(measured);
}

/** One short command in a warm sandbox. */
async function exec({ api, warm, workDir }: Bench): Promise<void> {
  const { id } = await api.create();
  const byHand = await liveClone(warm, workDir);
  try {
    for (let index = 0; index < 20; index += 1) {
      await api.exec(id, { cmd: "true" });
      await byHand.exec("true", []);
    }
    print(
      await contest({
        name: "exec",
        unit: "ms",
        runs: 101,
        product: () => timed(() => api.exec(id, { cmd: "true" })),
        floor: () => timed(() => byHand.exec("true", [])),
      }),
    );
  } finally {
    await byHand.dispose();
    await api.destroy(id);
  }
}

/** A pause with 10 MiB dirty, against a full `migrate` of the same guest; and a resume against a create. */
async function pauseResume(bench: Bench): Promise<void> {
  const {
    product: { agentDataDir },
    api,
    warm,
    workDir,
  } = bench;
  const resumes: number[] = [];
  const allowed: number[] = [];
  const layers: number[] = [];
  const pause = await contest({
    name: "pause",
    unit: "ms",
    runs: 9,
    product: async () => {
      let id = "";
      await poolIsFull(bench);
      const created = await timed(async () => {
        ({ id } = await api.create());
        await api.exec(id, { cmd: "true" });
      });
      await api.sh(id, DIRTY);
      const ms = await timed(() => api.pause(id));
      const layerMib = diskUsage(join(agentDataDir, "sandboxes", id)) / 2 ** 20;
      layers.push(layerMib);
      await poolIsFull(bench);
      resumes.push(
        await timed(async () => {
          await api.resume(id);
          await api.exec(id, { cmd: "true" });
        }),
      );
      allowed.push(created + 50 + 10 * layerMib);
      await api.destroy(id);
      return ms;
    },
    floor: async () => {
      const clone = await liveClone(warm, workDir);
      await clone.exec("/bin/sh", ["-c", DIRTY]);
      const ms = await timed(() => clone.migrateToFile(join(workDir, "migrated")));
      await clone.dispose();
      rmSync(join(workDir, "migrated"));
      return ms;
    },
  });
  print(pause);
  print({
    name: "resume",
    value: Math.round(median(resumes)),
    unit: "ms",
    floor: Math.round(median(allowed)),
    ratio: Math.round((median(resumes) / median(allowed)) * 1000) / 1000,
    runs: resumes.length,
    spread: 0,
  });
  const { id } = await api.create();
  let chained = 0;
  for (let round = 0; round < 20; round += 1) {
    await api.sh(id, DIRTY);
    await api.pause(id);
    chained = diskUsage(join(agentDataDir, "sandboxes", id)) / 2 ** 20;
    await api.resume(id);
  }
  await api.destroy(id);
  // The limits are the issue's: 20 MiB for a pause with 10 MiB dirty, also after 20 rounds.
  for (const [name, value] of [
    ["pause-disk", median(layers)],
    ["pause-disk-after-20", chained],
  ] as const) {
    print({
      name,
      value: round1(value),
      unit: "MiB",
      floor: 10,
      ratio: round1(value / 10),
      runs: 1,
      spread: 0,
    });
  }
}

/** 50 MB into a file of the guest. */
async function upload({ api, warm, workDir }: Bench): Promise<void> {
  const content = randomBytes(50_000_000);
  const { id } = await api.create();
  const byHand = await liveClone(warm, workDir);
  const throughput = async (work: () => Promise<void>): Promise<number> => 50 / ((await timed(work)) / 1000);
  try {
    print(
      await contest({
        name: "upload",
        unit: "MB/s",
        isThroughput: true,
        runs: 7,
        product: () => throughput(() => api.writeFile(id, "/home/user/upload", content)),
        floor: () => throughput(() => byHand.upload("/home/user/upload", content)),
      }),
    );
  } finally {
    await byHand.dispose();
    await api.destroy(id);
  }
}

/** What a clone holds right after `/init`: disk, and anonymous memory of its VMM. */
async function clone(bench: Bench): Promise<void> {
  const {
    product: { agentDataDir },
    api,
  } = bench;
  const disk: number[] = [];
  const memory: number[] = [];
  for (let run = 0; run < 7; run += 1) {
    await poolIsFull(bench);
    const before = new Set(vmmPids(agentDataDir));
    const { id } = await api.create();
    disk.push(diskUsage(join(agentDataDir, "sandboxes", id)) / 2 ** 20);
    // It was one of the pool's: the one that has the most private memory now.
    memory.push(Math.max(...[...before].map(anonymousMib)));
    await api.destroy(id);
  }
  print({
    name: "clone-disk",
    value: round1(median(disk)),
    unit: "MiB",
    floor: 1,
    ratio: round1(median(disk)),
    runs: 7,
    spread: 0,
  });
  print({
    name: "clone-memory",
    value: round1(median(memory)),
    unit: "MiB",
    floor: 40,
    ratio: round1(median(memory) / 40),
    runs: 7,
    spread: 0,
  });
}

async function liveClone(warm: WarmFiles, workDir: string): Promise<HandClone> {
  const made = await HandClone.spawn(warm, workDir);
  await made.thaw();
  await made.init();
  return made;
}

function anonymousMib(pid: number): number {
  const rollup = readFileSync(`/proc/${pid}/smaps_rollup`, "utf8");
  return Number(/Anonymous:\s+(\d+) kB/.exec(rollup)?.[1] ?? Number.NaN) / 1024;
}

/** Really allocated bytes below a directory. */
function diskUsage(dir: string): number {
  return readdirSync(dir, { recursive: true, withFileTypes: true })
    .filter((entry) => entry.isFile())
    .reduce((sum, entry) => sum + allocated(join(entry.parentPath, entry.name)), 0);
}

function allocated(path: string): number {
  return statSync(path).blocks * 512;
}

function round1(value: number): number {
  return Math.round(value * 10) / 10;
}
