/**
 * Which images there are, and what building one takes of the host.
 */
import { constants } from "node:fs";
import { access } from "node:fs/promises";
import { delimiter, join } from "node:path";
import { RookeryError } from "@rookery/protocol/errors";

/**
 * Part of every hash. Raise it when the builder makes other files from the same
 * inputs, so that hosts rebuild.
 */
export const BUILDER_VERSION = 1;

export interface ImageDefinition {
  name: string;
  /** Codename of the Debian release. */
  release: string;
  /** Beyond the essential and required ones, and apt. */
  packages: readonly string[];
  kernelPackage: string;
  rootDiskBytes: number;
}

/**
 * Debian's own nodejs is not in it: users get the pinned Node that envd runs on
 * (/usr/local/bin/node), which is newer, 90 MB less on disk, and already in the
 * guest's page cache.
 */
const BASE: ImageDefinition = {
  name: "base",
  release: "bookworm",
  packages: [
    "acl",
    "attr",
    "bash",
    "ca-certificates",
    "coreutils",
    "curl",
    "e2fsprogs", // resize2fs, for /init's growRootFs
    "git",
    "iproute2",
    "less",
    "libnss-myhostname", // any hostname resolves: each clone gets its own, and sudo looks it up
    "libstdc++6", // for Node
    "procps",
    "python-is-python3",
    "python3",
    "sudo",
    "tini",
    "util-linux",
  ],
  kernelPackage: "linux-image-cloud-amd64",
  rootDiskBytes: 4096 * 1024 * 1024,
};

const DEFINITIONS: ReadonlyMap<string, ImageDefinition> = new Map([[BASE.name, BASE]]);

export function imageDefinition(name: string): ImageDefinition {
  const definition = DEFINITIONS.get(name);
  if (definition === undefined) {
    throw new RookeryError(
      "template_not_found",
      `There is no guest image "${name}". Known: ${[...DEFINITIONS.keys()].join(", ")}.`,
    );
  }
  return definition;
}

/**
 * Where the distribution's own programs lie. A developer's PATH may have others
 * of the same name before them (a pyenv shim as mmdebstrap's python made a build
 * a minute slower).
 */
export const SYSTEM_PATH = "/usr/sbin:/usr/bin:/sbin:/bin";

/** Programs that building an image runs, by the Debian package that brings them. */
const REQUIRED_PROGRAMS: Readonly<Record<string, readonly string[]>> = {
  apt: ["apt-get", "apt-config"],
  coreutils: ["env", "truncate"],
  dpkg: ["dpkg-deb"],
  e2fsprogs: ["mkfs.ext4"],
  mmdebstrap: ["mmdebstrap"],
  tar: ["tar"],
  "util-linux": ["flock"],
  zstd: ["zstd"],
};

export interface BuilderProbe {
  ok: boolean;
  /** Why images cannot be built here, and what to do. */
  reason?: string;
  missingPackages: readonly string[];
}

/** Can images be built on this host? Fast; it touches nothing. */
export async function probeImageBuilder(): Promise<BuilderProbe> {
  const missingPackages: string[] = [];
  for (const [debianPackage, programs] of Object.entries(REQUIRED_PROGRAMS)) {
    const found = await Promise.all(programs.map(isInstalled));
    if (found.includes(false)) missingPackages.push(debianPackage);
  }
  if (process.arch !== "x64") {
    return {
      ok: false,
      reason: `guest images are built for x64 only, this host is ${process.arch}`,
      missingPackages,
    };
  }
  if (missingPackages.includes("apt") || missingPackages.includes("dpkg")) {
    return { ok: false, reason: "guest images are built with apt: use a Debian host", missingPackages };
  }
  if (missingPackages.length > 0) {
    return { ok: false, reason: `run: apt-get install ${missingPackages.join(" ")}`, missingPackages };
  }
  if (process.getuid?.() !== 0) {
    return {
      ok: false,
      reason: "building a guest image needs root (its files belong to the guest's root): run it with sudo",
      missingPackages,
    };
  }
  return { ok: true, missingPackages };
}

async function isInstalled(program: string): Promise<boolean> {
  for (const directory of SYSTEM_PATH.split(delimiter)) {
    try {
      await access(join(directory, program), constants.X_OK);
      return true;
    } catch {
      continue; // not in this one
    }
  }
  return false;
}
