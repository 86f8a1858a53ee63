/**
 * The guest's Debian tree, as an archive: everything of the root disk but
 * Rookery's own files. It takes more than half of a build, so it is cached by
 * its own key and a change of envd does not make it again.
 */
import { mkdir, readdir, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { RookeryError } from "@rookery/protocol/errors";
import { isErrno } from "../host/errno.ts";
import { CommandError } from "../host/run.ts";
import type { ArchiveSnapshot } from "./apt-archive.ts";
import { whileReporting } from "./apt-archive.ts";
import type { BuildContext } from "./build-context.ts";
import { SOURCE_DATE_EPOCH } from "./build-context.ts";
import type { ImageDefinition } from "./definitions.ts";

export const TREE_FILE = "tree.tar.zst";

const MMDEBSTRAP_TIMEOUT_MS = 900_000;
const PROGRESS_POLL_MS = 1000;

export const MMDEBSTRAP_OPTIONS: readonly string[] = [
  "--mode=root",
  "--variant=minbase",
  "--architectures=amd64",
  // The lists are our snapshot's: fetching them again could resolve to other versions.
  "--skip=update",
  // All packages are there already.
  "--skip=download/empty",
  '--aptopt=APT::Install-Recommends "false"',
  // A tree that a power cut spoiled is thrown away anyway.
  "--dpkgopt=force-unsafe-io",
];

/** Hooks get the tree as $1; our paths travel by the environment, so no quoting can go wrong. */
const HOOKS: readonly string[] = [
  '--setup-hook=mkdir -p "$1/var/lib/apt/lists/partial" "$1/var/cache/apt/archives/partial"',
  '--setup-hook=cp "$ROOKERY_LISTS"/* "$1/var/lib/apt/lists/"',
  '--setup-hook=cp --link "$ROOKERY_DEBS"/*.deb "$1/var/cache/apt/archives/"',
  '--customize-hook=sh "$ROOKERY_CUSTOMIZE" "$1"',
  '--customize-hook=cp "$ROOKERY_SOURCES" "$1/etc/apt/sources.list"',
];

/** Writes `tree.tar.zst` into `targetDir`. */
export async function makeDebianTree(
  context: BuildContext,
  options: {
    definition: ImageDefinition;
    archive: ArchiveSnapshot;
    debsDir: string;
    packageCount: number;
    workDir: string;
    targetDir: string;
  },
): Promise<void> {
  const { definition, archive, debsDir, packageCount, workDir, targetDir } = options;
  const temporaryDir = join(workDir, "mmdebstrap");
  await mkdir(temporaryDir, { recursive: true });
  await mkdir(targetDir, { recursive: true });
  const guestSources = join(workDir, "guest-sources.list");
  await writeFile(guestSources, archive.guestSources, { mode: 0o644 });

  const building = context.run(
    [
      "mmdebstrap",
      ...MMDEBSTRAP_OPTIONS,
      `--include=${definition.packages.join(",")}`,
      ...HOOKS,
      // No suite: the essential packages may come from any of the sources.
      "",
      join(targetDir, TREE_FILE),
      archive.sourcesFile,
    ],
    {
      signal: context.signal,
      timeoutMs: MMDEBSTRAP_TIMEOUT_MS,
      env: {
        TMPDIR: temporaryDir,
        SOURCE_DATE_EPOCH: String(SOURCE_DATE_EPOCH),
        ROOKERY_LISTS: archive.listsDir,
        ROOKERY_DEBS: debsDir,
        ROOKERY_CUSTOMIZE: join(context.guestFilesDir, "customize.sh"),
        ROOKERY_SOURCES: guestSources,
      },
    },
  );
  let unpacked = 0;
  await whileReporting(building, PROGRESS_POLL_MS, async () => {
    // It only grows: at the end the tree is packed up and taken away under our eyes.
    unpacked = Math.max(unpacked, Math.min(packageCount, await countUnpacked(temporaryDir)));
    if (unpacked < packageCount) {
      context.report("debian", `Unpacking ${packageCount} Debian packages`, unpacked / packageCount);
    } else {
      context.report("debian", `Configuring ${packageCount} Debian packages and packing them up`);
    }
  }).catch((cause: unknown) => {
    if (!(cause instanceof CommandError)) throw cause;
    throw new RookeryError("host_error", "mmdebstrap could not make the guest's Debian tree.", { cause });
  });
}

/** dpkg leaves one list of files per package that it unpacked. */
async function countUnpacked(temporaryDir: string): Promise<number> {
  const [tree] = await readdir(temporaryDir);
  if (tree === undefined) return 0;
  try {
    const names = await readdir(join(temporaryDir, tree, "var/lib/dpkg/info"));
    return names.filter((name) => name.endsWith(".list")).length;
  } catch (cause) {
    if (isErrno(cause, "ENOENT")) return 0; // not begun, or packed away
    throw cause;
  }
}
