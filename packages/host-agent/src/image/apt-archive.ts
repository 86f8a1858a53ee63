/**
 * Debian's archive as this host's own apt knows it: a private copy of its
 * package lists, and what they resolve to.
 *
 * apt is asked as if nothing were installed, with the Debian sources of one
 * release alone, so that the answer depends on the archive and not on this
 * host. Downloads go through the host's apt all the same: its proxies, its
 * credentials, its keys.
 */
import { createHash } from "node:crypto";
import { copyFile, mkdir, readdir, stat, writeFile } from "node:fs/promises";
import { basename, dirname, join } from "node:path";
import { z } from "zod";
import { RookeryError } from "@rookery/protocol/errors";
import { isErrno } from "../host/errno.ts";
import { CommandError } from "../host/run.ts";
import type { BuildContext } from "./build-context.ts";
import type { ImageDefinition } from "./definitions.ts";

/** Of apt: where lists and sources live unless told otherwise. */
const APT_STATE_DIRS = ["/var/lib/apt/lists", "/etc/apt", "/etc/apt/sources.list.d"];
const APT_HELPER = "/usr/lib/apt/apt-helper";
const UPDATE_TIMEOUT_MS = 300_000;
const DOWNLOAD_TIMEOUT_MS = 900_000;
/** Some 200 packages at 200 bytes each is what we expect. */
const MAX_APT_OUTPUT_BYTES = 8 << 20;
const DOWNLOAD_POLL_MS = 500;

/** One .deb; the file name has name, version and architecture. */
export const debPackageSchema = z.object({
  fileName: z.string().regex(/^[a-z0-9][a-z0-9.+-]*_[^_/]+_[a-z0-9]+\.deb$/),
  sizeBytes: z.number().int().nonnegative(),
  sha256: z.string().regex(/^[0-9a-f]{64}$/),
});
export type DebPackage = z.output<typeof debPackageSchema>;

export const resolvedPackagesSchema = z.object({
  /** sources.list of the guest: without credentials. */
  guestSources: z.string(),
  /** For the root disk. */
  tree: z.array(debPackageSchema),
  /** Kernel and busybox. */
  boot: z.array(debPackageSchema),
});
export type ResolvedPackages = z.output<typeof resolvedPackagesSchema>;

/** A directory with `lists/` and `sources.list`, made by `snapshotArchive`. */
export interface ArchiveSnapshot {
  dir: string;
  listsDir: string;
  sourcesFile: string;
  guestSources: string;
}

interface IndexTarget {
  repoUri: string;
  codename: string;
  component: string;
  metaKey: string;
  /** Of the package list. */
  file: string;
}

/**
 * Changes whenever apt's lists or sources do: file names, sizes and times. It
 * costs a few milliseconds, where asking apt costs seconds.
 */
export async function archiveFingerprint(): Promise<string> {
  const hash = createHash("sha256");
  for (const directory of APT_STATE_DIRS) {
    let names: string[];
    try {
      names = await readdir(directory);
    } catch (cause) {
      if (!isErrno(cause, "ENOENT")) throw cause;
      continue;
    }
    for (const name of names.sort()) {
      const facts = await stat(join(directory, name), { bigint: true }).catch((cause: unknown) => {
        if (isErrno(cause, "ENOENT")) return undefined; // apt replaced it under us: the next look differs
        throw cause;
      });
      if (facts?.isFile()) hash.update(`${directory}/${name} ${facts.size} ${facts.mtimeNs}\n`);
    }
  }
  return hash.digest("hex");
}

/** Copies the lists of the definition's release into `dir`; gets them first where the host has none yet. */
export async function snapshotArchive(
  context: BuildContext,
  definition: ImageDefinition,
  dir: string,
): Promise<ArchiveSnapshot> {
  let targets = await listIndexTargets(context, definition);
  if (targets.length === 0) {
    context.report("resolve", "This host has no package lists yet: running apt-get update");
    await updateLists(context);
    targets = await listIndexTargets(context, definition);
  }
  if (targets.length === 0) {
    throw new RookeryError(
      "host_error",
      `This host's apt sources have no Debian "${definition.release}" archive, which guests are made from. Add one (main, with its -security suite) and run apt-get update.`,
    );
  }
  const listsDir = join(dir, "lists");
  await mkdir(listsDir, { recursive: true });
  for (const target of targets) await copyLists(context, target, listsDir);
  const sourcesFile = join(dir, "sources.list");
  await writeFile(
    sourcesFile,
    sourcesOf(targets, (uri) => uri),
  );
  return { dir, listsDir, sourcesFile, guestSources: sourcesOf(targets, withoutCredentials) };
}

export async function resolvePackages(
  context: BuildContext,
  definition: ImageDefinition,
  archive: ArchiveSnapshot,
): Promise<ResolvedPackages> {
  // The same selection as mmdebstrap's variant "minbase".
  const minbase = ["?essential", "?and(?priority(required),?not(?essential))", "apt"];
  const tree = await resolveInstall(context, archive, [...minbase, ...definition.packages]);
  const kernelFamily = definition.kernelPackage.replace("linux-image-", "");
  const withDependencies = await resolveInstall(context, archive, [
    definition.kernelPackage,
    "busybox-static",
  ]);
  const boot = withDependencies.filter(
    ({ fileName }) =>
      fileName.startsWith("busybox-static_") ||
      (/^linux-image-\d/.test(fileName) && fileName.includes(`-${kernelFamily}_`)),
  );
  if (boot.length !== 2) {
    throw new RookeryError(
      "host_error",
      `${definition.kernelPackage} did not resolve to one kernel and one busybox but to: ${boot.map((deb) => deb.fileName).join(", ")}`,
    );
  }
  return { guestSources: archive.guestSources, tree, boot };
}

/** Makes `targetDir` hold these packages, checked by apt against the archive's signed lists. */
export async function downloadPackages(
  context: BuildContext,
  options: { archive: ArchiveSnapshot; packages: readonly DebPackage[]; targetDir: string },
): Promise<void> {
  const { archive, packages, targetDir } = options;
  await mkdir(targetDir, { recursive: true });
  const totalBytes = packages.reduce((sum, deb) => sum + deb.sizeBytes, 0);
  const message = `Downloading ${packages.length} packages, ${(totalBytes / 1e6).toFixed(0)} MB`;
  const download = context.run(
    // `apt-get download` writes into its working directory.
    [
      "env",
      "-C",
      targetDir,
      "apt-get",
      ...aptOptions(archive),
      "-qq",
      "download",
      ...packages.map(nameAndVersion),
    ],
    { signal: context.signal, timeoutMs: DOWNLOAD_TIMEOUT_MS },
  );
  const reportOnce = async (): Promise<void> => {
    const present = await sizesIn(targetDir);
    context.report("download", message, totalBytes === 0 ? 1 : Math.min(1, present / totalBytes));
  };
  await whileReporting(download, DOWNLOAD_POLL_MS, reportOnce).catch((cause: unknown) => {
    if (!(cause instanceof CommandError)) throw cause;
    throw new RookeryError(
      "host_error",
      "apt could not download the guest's packages. Check this host's network; if its package lists are old, run apt-get update and try again.",
      { cause },
    );
  });
}

/** Calls `report` every so often until `work` settles; its outcome is work's. */
export async function whileReporting<T>(
  work: Promise<T>,
  intervalMs: number,
  report: () => Promise<void>,
): Promise<T> {
  let reporting = report();
  const timer = setInterval(() => {
    reporting = reporting.then(report);
    reporting.catch(() => undefined); // surfaces at the await below
  }, intervalMs);
  try {
    return await work;
  } finally {
    clearInterval(timer);
    await reporting;
  }
}

async function updateLists(context: BuildContext): Promise<void> {
  try {
    await context.run(["apt-get", "-qq", "update"], { signal: context.signal, timeoutMs: UPDATE_TIMEOUT_MS });
  } catch (cause) {
    if (!(cause instanceof CommandError)) throw cause;
    throw new RookeryError(
      "host_error",
      "apt-get update failed. Check this host's network and apt sources.",
      { cause },
    );
  }
}

async function listIndexTargets(context: BuildContext, definition: ImageDefinition): Promise<IndexTarget[]> {
  const fields = ["REPO_URI", "CODENAME", "COMPONENT", "METAKEY", "FILENAME"];
  const { stdout } = await context.run(
    [
      "apt-get",
      "indextargets",
      "--format",
      fields.map((field) => `$(${field})`).join("\t"),
      "Created-By: Packages",
      "Origin: Debian",
      "Architecture: amd64",
    ],
    { signal: context.signal, maxOutputBytes: MAX_APT_OUTPUT_BYTES },
  );
  const releases = ["", "-updates", "-security"].map((suffix) => definition.release + suffix);
  const found: IndexTarget[] = [];
  for (const line of stdout.split("\n")) {
    const [repoUri, codename, component, metaKey, file] = line.split("\t");
    if (repoUri === undefined || codename === undefined || component === undefined) continue;
    if (metaKey === undefined || file === undefined || !releases.includes(codename)) continue;
    // Everything of the guest is in main.
    if (component === "main") found.push({ repoUri, codename, component, metaKey, file });
  }
  return found;
}

async function copyLists(context: BuildContext, target: IndexTarget, listsDir: string): Promise<void> {
  // apt names a list "<release>_<meta key>[.compression]"; the release's own files share the first part.
  const suffix = `_${target.metaKey.replaceAll("/", "_")}`;
  const name = basename(target.file);
  const at = name.lastIndexOf(suffix);
  if (at < 0) throw new Error(`apt keeps a package list under an unexpected name: ${name}`);
  const release = name.slice(0, at);
  await context.run(
    // Whatever compression the host keeps its lists in: apt in the new tree may not be set up for it.
    ["sh", "-c", 'exec "$0" cat-file "$1" >"$2"', APT_HELPER, target.file, join(listsDir, release + suffix)],
    { signal: context.signal },
  );
  for (const signed of ["InRelease", "Release", "Release.gpg"]) {
    const from = join(dirname(target.file), `${release}_${signed}`);
    await copyFile(from, join(listsDir, basename(from))).catch((cause: unknown) => {
      if (!isErrno(cause, "ENOENT")) throw cause; // an archive has either the first or the other two
    });
  }
}

function sourcesOf(targets: readonly IndexTarget[], mapUri: (uri: string) => string): string {
  const lines = targets.map(
    ({ repoUri, codename, component }) =>
      `deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] ${mapUri(repoUri)} ${codename} ${component}\n`,
  );
  return lines.sort().join("");
}

/** A mirror's password is this host's, not every guest's. */
function withoutCredentials(uri: string): string {
  return uri.replace(/\/\/[^/@]*@/, "//");
}

function aptOptions(archive: ArchiveSnapshot): string[] {
  const settings = {
    "APT::Install-Recommends": "false",
    // The files lie below a directory that apt's own user may not enter.
    "APT::Sandbox::User": "root",
    "Acquire::ForceHash": "SHA256",
    "Dir::Cache::archives": join(archive.dir, "none"),
    "Dir::Cache::pkgcache": "",
    "Dir::Cache::srcpkgcache": "",
    "Dir::Etc::preferences": "/dev/null",
    "Dir::Etc::preferencesparts": "/dev/null",
    "Dir::Etc::sourcelist": archive.sourcesFile,
    "Dir::Etc::sourceparts": "/dev/null",
    "Dir::State::lists": archive.listsDir,
    "Dir::State::status": "/dev/null",
  };
  return Object.entries(settings).flatMap(([name, value]) => ["-o", `${name}=${value}`]);
}

async function resolveInstall(
  context: BuildContext,
  archive: ArchiveSnapshot,
  names: readonly string[],
): Promise<DebPackage[]> {
  const { stdout } = await context.run(
    ["apt-get", ...aptOptions(archive), "-qq", "--print-uris", "install", ...names],
    { signal: context.signal, maxOutputBytes: MAX_APT_OUTPUT_BYTES },
  );
  return parsePrintedUris(stdout);
}

/** `'URI' FILE SIZE SHA256:HASH`, one line a package (apt-get(8), --print-uris). */
export function parsePrintedUris(output: string): DebPackage[] {
  const packages = output
    .split("\n")
    .filter((line) => line !== "")
    .map((line) => {
      const [, fileName, size, sha256] = /^'[^']*' (\S+) (\d+) SHA256:([0-9a-f]+)$/.exec(line) ?? [];
      return debPackageSchema.parse({ fileName, sizeBytes: Number(size), sha256 });
    });
  return packages.sort((a, b) => (a.fileName < b.fileName ? -1 : 1));
}

function nameAndVersion(deb: DebPackage): string {
  const [name, version] = deb.fileName.split("_");
  return `${name}=${decodeURIComponent(version ?? "")}`;
}

async function sizesIn(dir: string): Promise<number> {
  let sum = 0;
  for (const name of await readdir(dir)) {
    const facts = await stat(join(dir, name)).catch(() => undefined); // a partial file that was just renamed
    sum += facts?.size ?? 0;
  }
  return sum;
}
