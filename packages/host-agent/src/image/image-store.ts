/**
 * The guest images of one data directory: found by the hash of their inputs,
 * built when there is none of that hash.
 *
 *   DATA/images/HASH/            an image (guest-image.ts)
 *   DATA/images/.stage-NAME-KEY/ a stage's outcome: kernel files, Debian tree
 *   DATA/images/.build-ID/       a build under way; whoever has the lock removes what others left
 *   DATA/images/.lock            held while building, across processes
 *   DATA/images/.resolved-NAME.json, .hashes.json   caches; absent is as good as present
 *
 * Invariant: stages and images are made in .build-ID and renamed when whole, so
 * whatever has a name of its own is complete.
 */
import { chmod, link, mkdir, mkdtemp, open, readdir, rename } from "node:fs/promises";
import { join } from "node:path";
import { z } from "zod";
import { RookeryError } from "@rookery/protocol/errors";
import { readJson, removeTree, syncDirectory, writeFileAtomic } from "../host/atomic-file.ts";
import { isErrno } from "../host/errno.ts";
import type { run } from "../host/run.ts";
import type { ArchiveSnapshot, ResolvedPackages } from "./apt-archive.ts";
import {
  archiveFingerprint,
  downloadPackages,
  resolvePackages,
  resolvedPackagesSchema,
  snapshotArchive,
} from "./apt-archive.ts";
import type { BuildContext } from "./build-context.ts";
import { acquireBuildLock } from "./build-lock.ts";
import { IMAGE_KERNEL_ARGS } from "./cmdline.ts";
import { MMDEBSTRAP_OPTIONS, makeDebianTree } from "./debian-stage.ts";
import type { ImageDefinition } from "./definitions.ts";
import { BUILDER_VERSION, SYSTEM_PATH, imageDefinition, probeImageBuilder } from "./definitions.ts";
import type { GuestImage, ImageManifest, ImageProgress } from "./guest-image.ts";
import {
  INITRD_FILE,
  KERNEL_FILE,
  MANIFEST_FILE,
  ROOT_DISK_FILE,
  imageManifestSchema,
} from "./guest-image.ts";
import { hashFile, hashFileCached, hashOf, hashTree, readCache } from "./input-hash.ts";
import { makeKernelFiles } from "./kernel-stage.ts";
import { makeRootDisk } from "./root-disk-stage.ts";
import { shareWork } from "./share-work.ts";

const HASH_PATTERN = /^[0-9a-f]{64}$/;
const BUILD_PREFIX = ".build-";
const STAGE_PREFIX = ".stage-";

export interface ImageStoreOptions {
  /** Holds images by their hash, and stages of builds. Hard links lead from it to the VMMs' directories: same file system. */
  imagesDir: string;
  /** packages/guest-image. */
  guestFilesDir: string;
  /** envd.mjs and what it loads: becomes part of /usr/lib/rookery in the guest. */
  envdBundleDir: string;
  /** The Node that runs envd in the guest, and that users of the guest get. */
  nodeBinary: string;
  run: typeof run;
  clock: { now(): number };
  onProgress?: (event: ImageProgress) => void;
}

export interface ImageStore {
  /** The image of this name for the present inputs; built when it is not there yet. */
  ensure(name: string, signal: AbortSignal): Promise<GuestImage>;
  /** All complete images, newest first. Older inputs' images stay until they are removed. */
  list(): Promise<GuestImage[]>;
  /** Not for an image that anything stands on: its disk is the bottom of their chains. Bears running twice. */
  remove(hash: string): Promise<void>;
}

const resolvedCacheSchema = z.object({ key: z.string(), packages: resolvedPackagesSchema });

/** What an image is made from: `inputs` hashed is its name. */
interface ImageInputs {
  kernelKey: string;
  debianKey: string;
  inputs: Record<string, string>;
  hash: string;
}

export async function openImageStore(options: ImageStoreOptions): Promise<ImageStore> {
  const { imagesDir } = options;
  await mkdir(imagesDir, { recursive: true });
  const store = new DirectoryImageStore(options, imagesDir);
  return {
    ensure: shareWork((name, signal) => store.ensure(name, signal)),
    list: () => store.list(),
    remove: (hash) => store.remove(hash),
  };
}

class DirectoryImageStore {
  readonly #options: ImageStoreOptions;
  readonly #imagesDir: string;

  constructor(options: ImageStoreOptions, imagesDir: string) {
    this.#options = options;
    this.#imagesDir = imagesDir;
  }

  async ensure(name: string, signal: AbortSignal): Promise<GuestImage> {
    const definition = imageDefinition(name);
    const context = this.#contextOf(name, signal);
    const cached = await this.#cachedPackages(definition);
    if (cached !== undefined) {
      const { hash } = await this.#inputsOf(context, definition, cached);
      const image = await this.#open(hash);
      if (image !== undefined) return this.#ready(context, image);
    }
    await assertCanBuild();
    await using held = new AsyncDisposableStack();
    held.use(
      await acquireBuildLock(join(this.#imagesDir, ".lock"), {
        signal,
        onWait: () => context.report("wait", "Another process is building an image here: waiting for it"),
      }),
    );
    // Whoever left these is dead: it would have the lock.
    await this.#removeEntries((entry) => entry.startsWith(BUILD_PREFIX));
    const workDir = await mkdtemp(join(this.#imagesDir, BUILD_PREFIX));
    held.defer(() => removeTree(workDir));
    return this.#ready(context, await this.#build(context, definition, workDir));
  }

  async list(): Promise<GuestImage[]> {
    const names = (await readdir(this.#imagesDir)).filter((name) => HASH_PATTERN.test(name));
    const images = await Promise.all(names.map((hash) => this.#open(hash)));
    return images
      .filter((image) => image !== undefined)
      .sort((a, b) => b.createdAt.getTime() - a.createdAt.getTime());
  }

  async remove(hash: string): Promise<void> {
    if (!HASH_PATTERN.test(hash))
      throw new RookeryError("invalid_request", "That is not the hash of an image.");
    await removeTree(join(this.#imagesDir, hash));
  }

  #contextOf(image: string, signal: AbortSignal): BuildContext {
    const { run, guestFilesDir, onProgress } = this.#options;
    return {
      run: (argv, options) => run(argv, { ...options, env: { PATH: SYSTEM_PATH, ...options?.env } }),
      imagesDir: this.#imagesDir,
      guestFilesDir,
      signal,
      report: (step, message, fraction) => onProgress?.({ image, step, message, fraction }),
    };
  }

  #ready(context: BuildContext, image: GuestImage): GuestImage {
    context.report("ready", `Guest image ${image.name} ${image.hash.slice(0, 12)} is ready`, 1);
    return image;
  }

  /** What the last build resolved to, if apt's lists and our questions are still the same. */
  async #cachedPackages(definition: ImageDefinition): Promise<ResolvedPackages | undefined> {
    const cache = await readCache(this.#resolvedFile(definition), resolvedCacheSchema);
    return cache?.key === (await resolutionKey(definition)) ? cache.packages : undefined;
  }

  #resolvedFile(definition: ImageDefinition): string {
    return join(this.#imagesDir, `.resolved-${definition.name}.json`);
  }

  async #build(context: BuildContext, definition: ImageDefinition, workDir: string): Promise<GuestImage> {
    // Only what must be downloaded or resolved needs the archive: a change of envd does not.
    let snapshot: Promise<ArchiveSnapshot> | undefined;
    const archiveOnce = (): Promise<ArchiveSnapshot> =>
      (snapshot ??= snapshotArchive(context, definition, join(workDir, "archive")));
    // Again, under the lock: another process may just have resolved and built it.
    const packages =
      (await this.#cachedPackages(definition)) ?? (await this.#resolve(context, definition, archiveOnce));
    const wanted = await this.#inputsOf(context, definition, packages);
    const existing = await this.#open(wanted.hash);
    if (existing !== undefined) return existing;

    const kernelDir = await this.#stage(
      `${definition.name}-kernel`,
      wanted.kernelKey,
      workDir,
      async (targetDir) => {
        const debsDir = join(workDir, "boot-debs");
        const archive = await archiveOnce();
        await downloadPackages(context, { archive, packages: packages.boot, targetDir: debsDir });
        context.report("kernel", "Making kernel and initrd");
        await makeKernelFiles(context, { debsDir, workDir, targetDir });
      },
    );
    const debianDir = await this.#stage(
      `${definition.name}-debian`,
      wanted.debianKey,
      workDir,
      async (targetDir) => {
        const debsDir = join(workDir, "debs");
        const archive = await archiveOnce();
        await downloadPackages(context, { archive, packages: packages.tree, targetDir: debsDir });
        const packageCount = packages.tree.length;
        await makeDebianTree(context, { definition, archive, debsDir, packageCount, workDir, targetDir });
      },
    );

    const { envdBundleDir, nodeBinary } = this.#options;
    const targetDir = join(workDir, "image");
    await mkdir(targetDir);
    const sizeBytes = definition.rootDiskBytes;
    await makeRootDisk(context, { debianDir, envdBundleDir, nodeBinary, sizeBytes, workDir, targetDir });
    for (const file of [KERNEL_FILE, INITRD_FILE]) await link(join(kernelDir, file), join(targetDir, file));

    // envd or Node may have been replaced while they were copied: the hash must not lie.
    const after = await this.#inputsOf(context, definition, packages);
    if (after.hash !== wanted.hash) {
      throw new RookeryError(
        "wrong_state",
        "An input of the guest image changed while it was built. Build it again.",
      );
    }
    context.report("store", "Writing the image to disk");
    const image = await this.#store(definition, wanted, targetDir);
    const current = new Set([wanted.kernelKey, wanted.debianKey]);
    await this.#removeEntries(
      (entry) => entry.startsWith(`${STAGE_PREFIX}${definition.name}-`) && !current.has(entry.slice(-64)),
    );
    return image;
  }

  async #resolve(
    context: BuildContext,
    definition: ImageDefinition,
    archiveOnce: () => Promise<ArchiveSnapshot>,
  ): Promise<ResolvedPackages> {
    context.report("resolve", "Looking up the guest's packages in this host's apt sources");
    // Before the lists are read: should apt replace them meanwhile, the key no longer fits.
    const key = await resolutionKey(definition);
    const packages = await resolvePackages(context, definition, await archiveOnce());
    await writeFileAtomic(this.#resolvedFile(definition), JSON.stringify({ key, packages }), { sync: false });
    return packages;
  }

  async #inputsOf(
    context: BuildContext,
    definition: ImageDefinition,
    packages: ResolvedPackages,
  ): Promise<ImageInputs> {
    const { guestFilesDir, envdBundleDir, nodeBinary } = this.#options;
    const { signal } = context;
    const builder = String(BUILDER_VERSION);
    const versions = (debs: ResolvedPackages["tree"]): Record<string, string> =>
      Object.fromEntries(debs.map((deb) => [`deb ${deb.fileName}`, deb.sha256]));
    const kernelInputs = {
      builder,
      ...versions(packages.boot),
      initrd: await hashTree(join(guestFilesDir, "initrd"), signal),
    };
    const debianInputs = {
      builder,
      ...versions(packages.tree),
      sources: packages.guestSources,
      options: MMDEBSTRAP_OPTIONS.join(" "),
      customize: await hashFile(join(guestFilesDir, "customize.sh"), signal),
    };
    const inputs = {
      ...kernelInputs,
      ...debianInputs,
      name: definition.name,
      cmdline: IMAGE_KERNEL_ARGS.join(" "),
      rootDiskBytes: String(definition.rootDiskBytes),
      files: await hashTree(join(guestFilesDir, "root"), signal),
      envd: await hashTree(envdBundleDir, signal),
      node: await hashFileCached(nodeBinary, join(this.#imagesDir, ".hashes.json"), signal),
    };
    return {
      kernelKey: hashOf(kernelInputs),
      debianKey: hashOf(debianInputs),
      inputs,
      hash: hashOf(inputs),
    };
  }

  /** A stage's directory, made by `make` unless one of this key is there. */
  async #stage(
    name: string,
    key: string,
    workDir: string,
    make: (targetDir: string) => Promise<void>,
  ): Promise<string> {
    const entry = `${STAGE_PREFIX}${name}-${key}`;
    const dir = join(this.#imagesDir, entry);
    if ((await readdir(this.#imagesDir)).includes(entry)) return dir;
    const targetDir = join(workDir, name);
    await make(join(targetDir, "files"));
    await syncFiles(join(targetDir, "files"));
    await rename(join(targetDir, "files"), dir);
    await syncDirectory(this.#imagesDir);
    return dir;
  }

  async #store(definition: ImageDefinition, wanted: ImageInputs, targetDir: string): Promise<GuestImage> {
    await syncFiles(targetDir);
    const manifest: ImageManifest = {
      version: 1,
      name: definition.name,
      hash: wanted.hash,
      cmdline: wanted.inputs["cmdline"] ?? "",
      rootDiskBytes: definition.rootDiskBytes,
      createdAt: new Date(this.#options.clock.now()).toISOString(),
      inputs: wanted.inputs,
    };
    const dir = join(this.#imagesDir, wanted.hash);
    await writeFileAtomic(join(targetDir, MANIFEST_FILE), JSON.stringify(manifest, undefined, 2), {
      mode: 0o644,
    });
    await chmod(targetDir, 0o755);
    // Without a manifest: left by a removal that was cut short.
    await removeTree(dir);
    await rename(targetDir, dir);
    await syncDirectory(this.#imagesDir);
    return imageOf(dir, manifest);
  }

  async #open(hash: string): Promise<GuestImage | undefined> {
    const dir = join(this.#imagesDir, hash);
    try {
      return imageOf(dir, await readJson(join(dir, MANIFEST_FILE), imageManifestSchema));
    } catch (cause) {
      if (isErrno(cause, "ENOENT")) return undefined;
      throw cause;
    }
  }

  async #removeEntries(isGarbage: (entry: string) => boolean): Promise<void> {
    for (const entry of await readdir(this.#imagesDir)) {
      if (isGarbage(entry)) await removeTree(join(this.#imagesDir, entry));
    }
  }
}

async function resolutionKey(definition: ImageDefinition): Promise<string> {
  return hashOf({
    builder: String(BUILDER_VERSION),
    definition: JSON.stringify(definition),
    archive: await archiveFingerprint(),
  });
}

async function assertCanBuild(): Promise<void> {
  const { ok, reason } = await probeImageBuilder();
  if (!ok) throw new RookeryError("host_error", `This host cannot build guest images: ${reason}.`);
}

/** Read-only for everyone, and durable. */
async function syncFiles(dir: string): Promise<void> {
  for (const name of await readdir(dir)) {
    await using file = await open(join(dir, name), "r");
    await file.chmod(0o444);
    await file.sync();
  }
  await syncDirectory(dir);
}

function imageOf(dir: string, manifest: ImageManifest): GuestImage {
  return {
    name: manifest.name,
    hash: manifest.hash,
    dir,
    kernel: join(dir, KERNEL_FILE),
    initrd: join(dir, INITRD_FILE),
    cmdline: manifest.cmdline,
    rootDisk: { path: join(dir, ROOT_DISK_FILE), format: "raw", sizeBytes: manifest.rootDiskBytes },
    createdAt: new Date(manifest.createdAt),
  };
}
