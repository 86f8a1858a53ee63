/**
 * Root disks as qcow2 overlays on one file system.
 *
 * DIR/disk.json                 the chain; replaced last, it alone says which top is the disk's
 * DIR/top-N/disk.qcow2          the top over a chain of N files
 * DIR/top-N/below-0 … below-N-1 links to them: a header names its backing file `below-N-1`
 * DIR/top-N+1/                  a prepared next top, over top-N
 *
 * A header's name is relative, so it stays right when a disk is renamed or a
 * top becomes a layer; VMMs and our own tools get the whole graph explicitly
 * and never follow a header (see qcow2-header.ts).
 *
 * Invariants: N is the chain's length, so the manifest names the top; a
 * manifest never names a file that is not there. Each method may be cut off
 * between any two effects and called again (`afterEffect` lets tests do it).
 *
 * Not covered: a VMM that was broken into and keeps a file descriptor of a top
 * through a fork can still write to that layer, which its own team's children use.
 */
import { link, lstat, mkdir, mkdtemp, open, readdir, rename, stat, symlink } from "node:fs/promises";
import { tmpdir } from "node:os";
import { dirname, join, resolve } from "node:path";
import { removeTree, syncDirectory } from "../host/atomic-file.ts";
import { isErrno } from "../host/errno.ts";
import { CommandError } from "../host/run.ts";
import type { LayerId } from "../ids.ts";
import { diskManifestPath, readDiskManifest, writeDiskManifest } from "./disk-manifest.ts";
import { EmptyTops } from "./empty-top.ts";
import { isLayerId, unfinishedLayerDir } from "./layers.ts";
import { giveTo } from "./ownership.ts";
import { readQcow2Header } from "./qcow2-header.ts";
import type { Qcow2Header } from "./qcow2-header.ts";
import {
  attachment,
  checkGeometry,
  exists,
  FILE,
  isNextTop,
  isSameFile,
  lastLayerId,
  layerFiles,
  linkBelow,
  nextDir,
  nextFile,
  presentTopFromNext,
  replaceLink,
  syncFile,
  topDir,
  topFile,
} from "./qcow2-layout.ts";
import { belowName, runImageTool } from "./qcow2-tool.ts";
import type { DiskAttachment, DiskLayer, DiskUser, RootDisk, RootDiskDriver } from "./root-disk.ts";
import { linkInto, linkNameOf, removeLink, removeLinks } from "./run-dir-links.ts";

const BLOCK_BYTES = 512;

export interface Qcow2Options {
  /** Where disks will lie: `probe` tries that file system. */
  dataDir?: string;
  /** Whom `qemu-img` runs as where the agent is root; no VMM's uid. */
  toolUid?: number;
  /** Layers above the image from which on `flatten` is due: each is one more lookup for a block that the guest reads first. */
  maxLayers?: number;
  /** Called after each effect on the file system that a crash could be the next thing after. */
  afterEffect?: (effect: string) => void;
}

export class Qcow2RootDisks implements RootDiskDriver {
  readonly kind = "qcow2";
  readonly #options: Required<Qcow2Options>;
  readonly #emptyTops = new EmptyTops();

  constructor(options: Qcow2Options = {}) {
    this.#options = {
      dataDir: tmpdir(),
      toolUid: 65_534,
      maxLayers: 8,
      afterEffect: () => undefined,
      ...options,
    };
  }

  async probe(signal: AbortSignal): Promise<{ ok: boolean; reason?: string }> {
    let scratch: string | undefined;
    try {
      scratch = await mkdtemp(join(this.#options.dataDir, ".probe-root-disk-"));
      const image = join(scratch, "image.raw");
      const runDir = join(scratch, "run");
      await mkdir(runDir);
      await using file = await open(image, "wx", 0o444);
      await file.truncate(1 << 20);
      const chain: DiskLayer[] = [{ kind: "image", path: image, format: "raw" }];
      const disk = await this.create({ dir: join(scratch, "disk"), chain, sizeBytes: 1 << 20 }, signal);
      const user: DiskUser = { runDir, uid: process.getuid?.() === 0 ? this.#options.toolUid : 0 };
      await this.attach(disk, user, signal);
      await this.detach(disk, user, signal);
      await this.grow(disk, 2 << 20, signal);
      return { ok: true };
    } catch (cause) {
      signal.throwIfAborted();
      return { ok: false, reason: whyNot(cause) };
    } finally {
      if (scratch !== undefined) await removeTree(scratch);
    }
  }

  async create(
    options: { dir: string; chain: readonly DiskLayer[]; sizeBytes: number },
    signal: AbortSignal,
  ): Promise<RootDisk> {
    const disk: RootDisk = { driver: this.kind, ...options, dir: resolve(options.dir) };
    await checkGeometry(disk);
    await mkdir(disk.dir, { recursive: true, mode: 0o700 });
    if (await exists(diskManifestPath(disk.dir))) throw new Error(`${disk.dir}: there is a disk already`);
    const below = disk.chain.map((layer) => layer.path);
    await this.#makeTop(topDir(disk), below, disk.sizeBytes, signal);
    await writeDiskManifest(disk, { sync: false });
    this.#options.afterEffect("manifest written");
    return disk;
  }

  async open(dir: string): Promise<RootDisk> {
    const disk = await readDiskManifest(resolve(dir), this.kind);
    await lstat(topFile(disk));
    return disk;
  }

  async attach(disk: RootDisk, user: DiskUser, signal: AbortSignal): Promise<DiskAttachment> {
    signal.throwIfAborted();
    await giveTo(topFile(disk), user.uid, 0o600);
    const files = [topFile(disk), ...layerFiles(disk)];
    return attachment(await Promise.all(files.map((file) => linkInto(user.runDir, file))), disk);
  }

  async detach(disk: RootDisk, user: DiskUser, signal: AbortSignal): Promise<void> {
    signal.throwIfAborted();
    await removeLinks(user.runDir);
    const present = await this.#present(disk.dir);
    if (present === undefined) return;
    await giveTo(topFile(present), 0, 0o600);
    // A fork that was cut off after the VMM switched: its data is in there.
    if (await isNextTop(present)) await giveTo(nextFile(present), 0, 0o600);
    await this.#removeStrays(present);
  }

  async prepareNextTop(
    disk: RootDisk,
    user: DiskUser | undefined,
    signal: AbortSignal,
  ): Promise<{ next: DiskAttachment }> {
    // One that stands on the present top is never made anew: a VMM may be writing to it.
    if (!(await isNextTop(disk))) {
      const below = [...disk.chain.map((layer) => layer.path), presentTopFromNext(disk)];
      await this.#makeTop(nextDir(disk), below, disk.sizeBytes, signal);
    }
    const files = [nextFile(disk), topFile(disk), ...layerFiles(disk)];
    if (user === undefined) return { next: attachment(await Promise.all(files.map(linkNameOf)), disk) };
    await giveTo(nextFile(disk), user.uid, 0o600);
    const names = await Promise.all(files.map((file) => linkInto(user.runDir, file)));
    return { next: attachment(names, disk) };
  }

  async commitNextTop(
    disk: RootDisk,
    options: { layerId: LayerId; layersDir: string },
    signal: AbortSignal,
  ): Promise<RootDisk> {
    signal.throwIfAborted();
    const { layerId } = options;
    const { afterEffect } = this.#options;
    if (!isLayerId(layerId)) throw new Error(`not a layer id: ${String(layerId)}`);
    const layerDir = join(resolve(options.layersDir), layerId);
    const present = await this.open(disk.dir);
    if (lastLayerId(present) === layerId) {
      await this.#removeStrays(present);
      return present;
    }
    if (!(await isNextTop(present))) throw new Error(`${disk.dir}: no next top was prepared`);

    await this.#makeLayer(present, layerDir, layerId);
    await replaceLink(join(nextDir(present), belowName(present.chain.length)), join(layerDir, FILE));
    afterEffect("next top names the layer");
    await syncFile(nextFile(present));
    await syncDirectory(nextDir(present));

    const layer: DiskLayer = { kind: "layer", id: layerId, path: join(layerDir, FILE), format: "qcow2" };
    const committed: RootDisk = { ...present, chain: [...present.chain, layer] };
    await writeDiskManifest(committed, { sync: true });
    afterEffect("manifest written");
    await this.#removeStrays(committed);
    return committed;
  }

  async adoptLayer(
    options: { file: string; layerId: LayerId; layersDir: string; below: readonly DiskLayer[] },
    signal: AbortSignal,
  ): Promise<DiskLayer> {
    signal.throwIfAborted();
    const { file, layerId, below } = options;
    if (!isLayerId(layerId)) throw new Error(`not a layer id: ${String(layerId)}`);
    const layersDir = resolve(options.layersDir);
    const path = join(layersDir, layerId, FILE);
    const layer: DiskLayer = { kind: "layer", id: layerId, path, format: "qcow2" };
    if (await exists(path)) return layer;
    const { backingFile } = await readQcow2Header(file);
    const expected = belowName(below.length - 1);
    if (backingFile !== expected) {
      throw new Error(`${file}: stands on ${backingFile ?? "nothing"}, not on ${expected}`);
    }
    await giveTo(file, 0, 0o444);
    await syncFile(file);
    const unfinished = unfinishedLayerDir(layersDir, layerId);
    await removeTree(unfinished);
    await mkdir(unfinished, { recursive: true, mode: 0o700 });
    await linkBelow(
      unfinished,
      below.map((each) => each.path),
    );
    await rename(file, join(unfinished, FILE));
    await syncDirectory(unfinished);
    await rename(unfinished, join(layersDir, layerId));
    await syncDirectory(layersDir);
    return layer;
  }

  async abortNextTop(disk: RootDisk, user: DiskUser | undefined): Promise<void> {
    // By the manifest, not by `disk`: what was the next top once may be the top now.
    const present = await this.#present(disk.dir);
    if (present === undefined) return;
    if (user !== undefined && (await exists(nextFile(present)))) {
      await removeLink(join(user.runDir, await linkNameOf(nextFile(present))));
      this.#options.afterEffect("link of the next top removed");
    }
    await removeTree(nextDir(present));
    this.#options.afterEffect("next top removed");
  }

  async grow(disk: RootDisk, sizeBytes: number, signal: AbortSignal): Promise<RootDisk> {
    if (sizeBytes < disk.sizeBytes) {
      throw new Error(`${disk.dir}: a disk of ${disk.sizeBytes} bytes does not shrink to ${sizeBytes}`);
    }
    const grown: RootDisk = { ...disk, sizeBytes };
    await checkGeometry(grown);
    // A VMM that resized its disk has left only the manifest to us.
    const header = await this.#checkedHeader(disk);
    if (header.sizeBytes < sizeBytes) {
      await runImageTool(this.#toolTarget(disk), { subcommand: "resize", after: [`${sizeBytes}`] }, signal);
      this.#options.afterEffect("top resized");
      await syncFile(topFile(disk));
    }
    await writeDiskManifest(grown, { sync: true });
    return grown;
  }

  needsFlatten(disk: RootDisk): boolean {
    return disk.chain.length - 1 > this.#options.maxLayers;
  }

  async flatten(disk: RootDisk, signal: AbortSignal): Promise<RootDisk> {
    const [image] = disk.chain;
    if (image === undefined || disk.chain.length === 1) return disk;
    if (await isNextTop(disk)) throw new Error(`${disk.dir}: a fork of this disk has not ended`);
    const { backingFile } = await this.#checkedHeader(disk);
    // In place: rebase copies into the top what differs from the image and then
    // changes its header, so that the old chain and the new read alike at any time.
    if (backingFile !== belowName(0)) {
      const rebase = { subcommand: "rebase", args: ["-b", belowName(0), "-F", image.format] } as const;
      await runImageTool(this.#toolTarget(disk), rebase, signal);
      this.#options.afterEffect("top rebased");
    }
    await syncFile(topFile(disk));

    const flat: RootDisk = { ...disk, chain: [image] };
    const unfinished = `${topDir(flat)}.tmp`;
    await removeTree(unfinished);
    await removeTree(topDir(flat));
    await mkdir(unfinished, { mode: 0o700 });
    await symlink(image.path, join(unfinished, belowName(0)));
    await link(topFile(disk), join(unfinished, FILE));
    await syncDirectory(unfinished);
    await rename(unfinished, topDir(flat));
    this.#options.afterEffect("flat top linked");
    await writeDiskManifest(flat, { sync: true });
    this.#options.afterEffect("manifest written");
    await this.#removeStrays(flat);
    return flat;
  }

  async allocatedBytes(disk: RootDisk): Promise<number> {
    return (await stat(topFile(disk))).blocks * BLOCK_BYTES;
  }

  async sync(disk: RootDisk): Promise<void> {
    await syncFile(topFile(disk));
    await syncFile(diskManifestPath(disk.dir));
    for (const directory of [topDir(disk), disk.dir, dirname(disk.dir)]) await syncDirectory(directory);
  }

  async remove(dir: string): Promise<void> {
    await removeTree(dir);
  }

  /** A whole top or none: `below` are the links' targets, bottom first. */
  async #makeTop(
    directory: string,
    below: readonly string[],
    sizeBytes: number,
    signal: AbortSignal,
  ): Promise<void> {
    const unfinished = `${directory}.tmp`;
    await removeTree(unfinished);
    await removeTree(directory);
    await mkdir(unfinished, { mode: 0o700 });
    await linkBelow(unfinished, below);
    this.#options.afterEffect("links of a top made");
    const backingFormat = below.length === 1 ? "raw" : "qcow2";
    await this.#emptyTops.write(
      join(unfinished, FILE),
      { sizeBytes, backingFile: belowName(below.length - 1), backingFormat },
      signal,
    );
    this.#options.afterEffect("file of a top made");
    await rename(unfinished, directory);
    this.#options.afterEffect("top named");
  }

  /** The present top, durable and read-only, under its name among the layers. */
  async #makeLayer(disk: RootDisk, layerDir: string, layerId: LayerId): Promise<void> {
    const { afterEffect } = this.#options;
    const layersDir = dirname(layerDir);
    await this.#checkedHeader(disk);
    await giveTo(topFile(disk), 0, 0o444);
    await syncFile(topFile(disk));
    afterEffect("top made read-only");
    if (await exists(layerDir)) {
      if (!(await isSameFile(join(layerDir, FILE), topFile(disk)))) {
        throw new Error(`${layerDir}: is another disk's layer already`);
      }
      return;
    }
    const unfinished = unfinishedLayerDir(layersDir, layerId);
    await removeTree(unfinished);
    await mkdir(unfinished, { recursive: true, mode: 0o700 });
    await linkBelow(
      unfinished,
      disk.chain.map((layer) => layer.path),
    );
    await link(topFile(disk), join(unfinished, FILE));
    await syncDirectory(unfinished);
    afterEffect("layer made");
    await rename(unfinished, layerDir);
    afterEffect("layer named");
    await syncDirectory(layersDir);
  }

  /** The disk as its manifest has it, or undefined when it was removed. */
  async #present(dir: string): Promise<RootDisk | undefined> {
    try {
      return await readDiskManifest(resolve(dir), this.kind);
    } catch (cause) {
      if (isErrno(cause, "ENOENT")) return undefined;
      throw cause;
    }
  }

  async #checkedHeader(disk: RootDisk): Promise<Qcow2Header> {
    const header = await readQcow2Header(topFile(disk));
    const expected = [belowName(disk.chain.length - 1), belowName(0)]; // the second: a flatten that was cut off
    if (header.backingFile === undefined || !expected.includes(header.backingFile)) {
      throw new Error(
        `${topFile(disk)}: stands on ${header.backingFile ?? "nothing"}, not on ${expected[0]}`,
      );
    }
    return header;
  }

  /** What operations that were cut off left, and tops that are no longer the disk's. */
  async #removeStrays(disk: RootDisk): Promise<void> {
    for (const name of await readdir(disk.dir)) {
      const path = join(disk.dir, name);
      const isTop = path === topDir(disk) || (path === nextDir(disk) && (await isNextTop(disk)));
      if (/^(top-|tool$)/.test(name) && !isTop) {
        await removeTree(path);
        this.#options.afterEffect("stray removed");
      }
    }
  }

  #toolTarget(disk: RootDisk) {
    const { toolUid } = this.#options;
    return { workDir: join(disk.dir, "tool"), topFile: topFile(disk), chain: disk.chain, toolUid };
  }
}

/** Words a person can act on. */
function whyNot(cause: unknown): string {
  if (isErrno(cause, "EXDEV"))
    return "disks and run directories must lie on one file system that has hard links";
  if (cause instanceof CommandError && isErrno(cause.cause, "ENOENT")) {
    return `the program ${cause.argv[0]} is missing: install qemu-utils and util-linux`;
  }
  return cause instanceof Error ? cause.message : String(cause);
}
