/**
 * Simulated hosts that share one object store. Each has booted its own warm
 * image: none could load a memory layer of another without fetching its base.
 */
import { createHash } from "node:crypto";
import { existsSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { mkdir, readdir } from "node:fs/promises";
import { join } from "node:path";
import { removeTree } from "../../host/atomic-file.ts";
import type { LayerId, WarmKey } from "../../ids.ts";
import { DirectoryStore } from "../../object-store/directory.ts";
import type { ObjectStore } from "../../object-store/object-store.ts";
import type { Clock } from "../../sandbox-manager/clock.ts";
import { compatOf } from "../../sandbox-manager/compat.ts";
import { openCore } from "../../sandbox-manager/index.ts";
import type { Stage } from "../../sandbox-manager/testing/scenarios.ts";
import {
  openSimulatedMachine,
  type SimulatedMachineOptions,
} from "../../sandbox-manager/testing/simulated-machine.ts";
import type { WarmImage } from "../../sandbox-manager/warm-images.ts";
import { fillWarmImage } from "../../warm-images/build-warm-image.ts";
import { readWarmImage } from "../../warm-images/warm-manifest.ts";
import type { WarmTaker } from "../fetch-snapshot.ts";
import { StoredSnapshots } from "../snapshot-store.ts";

export interface HostOptions extends SimulatedMachineOptions {
  /** Ends the name of a host whose CPU is another. */
  fingerprint?: string;
  /** Instead of the store itself. */
  through?: (store: ObjectStore) => ObjectStore;
}

/** Whose hosts are directories of `root`; a name opened again is its agent started anew. */
export class SharingHosts {
  readonly #root: string;
  readonly store: DirectoryStore;
  readonly #clock: Clock | undefined;

  constructor(root: string, clock?: Clock) {
    this.#root = root;
    this.#clock = clock;
    this.store = new DirectoryStore(join(root, "store"));
  }

  async open(name: string, options: HostOptions = {}): Promise<Stage> {
    const root = join(this.#root, name);
    const seed = Buffer.from(name).reduce((sum, byte) => sum * 31 + byte, 7);
    const machine = openSimulatedMachine(root, {
      seed,
      ...(this.#clock !== undefined && { clock: this.#clock }),
      ...options,
    });
    const { deps } = machine;
    if (options.fingerprint !== undefined) {
      const { fingerprint } = options;
      deps.vmm = { ...deps.vmm, fingerprint: async () => fingerprint };
    }
    const warmImages = await openWarmImages(root, ownWarmImage(root, machine.warm, seed % 1000));
    deps.warmImages = warmImages;
    deps.snapshotStore = await StoredSnapshots.open({
      store: options.through?.(this.store) ?? this.store,
      dataDir: deps.config.dataDir,
      imagesDir: join(root, "images"),
      warmImages,
      rootDisk: deps.rootDisk,
      compatOf: (fingerprint) => compatOf(deps, fingerprint),
      nowMs: () => deps.clock.nowMs(),
      sleep: async (_ms, signal) => signal.throwIfAborted(),
      logger: deps.logger,
    });
    const { core, manager } = await openCore(deps);
    manager.startUploads();
    return { machine, core, manager };
  }

  /** Of this host's data: what is there, below `folder`. */
  names(host: string, folder: string): string[] {
    const dir = join(this.#root, host, "data", folder);
    return existsSync(dir) ? readdirSync(dir).sort() : [];
  }
}

/** As a template that ran here: its disk has the image, and a layer that says how often. */
function ownWarmImage(root: string, made: WarmImage, runs: number): WarmImage {
  const dir = join(root, "warm");
  const layerId = "lywarm000000000000" as LayerId;
  const path = join(dir, "disk", layerId, "disk.qcow2");
  const text = JSON.stringify({ memory: {}, runs });
  if (!existsSync(path)) {
    mkdirSync(join(dir, "disk", layerId), { recursive: true });
    writeFileSync(path, String(runs));
    writeFileSync(join(dir, "memory.base"), text);
  }
  const memorySha256 = createHash("sha256")
    .update(readFileSync(join(dir, "memory.base")))
    .digest("hex");
  return {
    ...made,
    base: { ...made.base, memorySha256, deviceStateSha256: sha256("") },
    image: { name: "base", hash: sha256("what it was built from") },
    diskChain: [...made.diskChain, { kind: "layer", id: layerId, path, format: "qcow2" }],
  };
}

function sha256(text: string): string {
  return createHash("sha256").update(text).digest("hex");
}

async function openWarmImages(
  root: string,
  own: WarmImage,
): Promise<WarmTaker & Stage["machine"]["deps"]["warmImages"]> {
  const warmDir = join(root, "data", "warm");
  await mkdir(warmDir, { recursive: true });
  const known = new Map<WarmKey, WarmImage>([[own.key, own]]);
  for (const name of await readdir(warmDir)) {
    if (name.startsWith(".")) await removeTree(join(warmDir, name));
    else known.set(name as WarmKey, await readWarmImage(join(warmDir, name)));
  }
  return {
    ensure: async () => own,
    open: async (key) => known.get(key),
    async takeIn(key, fill, signal) {
      const warm = known.get(key) ?? (await fillWarmImage(warmDir, key, (dir) => fill(dir, signal)));
      known.set(key, warm);
      return warm;
    },
    list: () => [...known.values()],
  };
}
