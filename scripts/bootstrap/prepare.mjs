/**
 * From a fresh clone to programs that can run: Node 24, npm packages, Debian
 * packages, bundles. Each step looks first whether there is anything to do.
 *
 * It runs on whatever Node the machine has (20 or newer) and imports nothing
 * that npm would have to install.
 */
import { createHash } from "node:crypto";
import { existsSync, readFileSync, readdirSync, renameSync, rmSync, statSync, writeFileSync } from "node:fs";
import { arch } from "node:os";
import { delimiter, join } from "node:path";
import { isRoot, repoDir } from "./paths.mjs";
import { say, step } from "./progress.mjs";
import { StepError, run } from "./run.mjs";

export const NODE_VERSION = "24.21.0";

/** Debian packages, what the product needs of each, and a file that proves it is there. */
const DEBIAN_PACKAGES = [
  ["qemu-system-x86", "runs the sandboxes", "/usr/bin/qemu-system-x86_64"],
  ["qemu-utils", "root disks (qemu-img)", "/usr/bin/qemu-img"],
  ["mmdebstrap", "builds the guest's root disk", "/usr/bin/mmdebstrap"],
  ["nftables", "guest firewall", "/usr/sbin/nft"],
  ["iproute2", "guest networks", "/usr/sbin/ip"],
  ["e2fsprogs", "guest file systems", "/usr/sbin/mkfs.ext4"],
  ["zstd", "stages of the guest image", "/usr/bin/zstd"],
  ["util-linux", "namespaces (nsenter, unshare, setpriv)", "/usr/bin/setpriv"],
];

/**
 * @param {ReturnType<typeof import("./paths.mjs").productPaths>} paths
 * @returns {Promise<{node: string, env: NodeJS.ProcessEnv}>} Node 24 and an environment that finds it first
 */
export async function prepareTools(paths) {
  const node = await ensureNode(paths);
  const env = {
    ...process.env,
    PATH: [
      join(node, ".."),
      join(repoDir, "node_modules", ".bin"),
      "/usr/sbin",
      "/sbin",
      process.env.PATH,
    ].join(delimiter),
  };
  await ensureNpmPackages(paths, env);
  return { node, env };
}

async function ensureNode({ toolchainDir }) {
  const platform = { x64: "linux-x64", arm64: "linux-arm64" }[arch()];
  if (process.platform !== "linux" || !platform) {
    throw new StepError(`Rookery runs on Linux, x64 or arm64; this is ${process.platform} ${arch()}.`);
  }
  const dir = join(toolchainDir, `node-${NODE_VERSION}`);
  const node = join(dir, "bin", "node");
  if (existsSync(node)) return node;
  await step(`Node ${NODE_VERSION} (an npm package; this machine has ${process.version})`, async (note) => {
    const unpacking = `${dir}.partial-${process.pid}`;
    rmSync(unpacking, { recursive: true, force: true });
    const name = `node-${platform}`;
    await run(
      [
        "npm",
        "install",
        "--prefix",
        unpacking,
        "--no-save",
        "--ignore-scripts",
        "--no-package-lock",
        `${name}@${NODE_VERSION}`,
      ],
      { note, cwd: toolchainDir, env: { ...process.env, npm_config_engine_strict: "false" } },
    );
    rmSync(dir, { recursive: true, force: true });
    renameSync(join(unpacking, "node_modules", name), dir);
    rmSync(unpacking, { recursive: true, force: true });
  });
  return node;
}

async function ensureNpmPackages({ stampDir }, env) {
  const stamp = join(stampDir, "npm");
  const wanted = createHash("sha256")
    .update(readFileSync(join(repoDir, "package-lock.json")))
    .update(NODE_VERSION)
    .digest("hex");
  const have = existsSync(stamp) ? readFileSync(stamp, "utf8") : "";
  if (have === wanted && existsSync(join(repoDir, "node_modules"))) return;
  await step("npm packages, as the lock file has them", async (note) => {
    await run(["npm", "ci", "--no-audit", "--no-fund"], { cwd: repoDir, env, note });
    writeFileSync(stamp, wanted);
  });
}

/** Installs missing Debian packages, after saying which and why; without root, says what to run. */
export async function ensureDebianPackages(env) {
  const missing = DEBIAN_PACKAGES.filter(([, , proof]) => !existsSync(proof) && !existsSync(`/usr${proof}`));
  if (missing.length === 0) return;
  say(`Missing on this machine: ${missing.map(([name, why]) => `${name} (${why})`).join(", ")}`);
  const names = missing.map(([name]) => name);
  if (!isRoot || !existsSync("/usr/bin/apt-get")) {
    throw new StepError(
      `Install them first, as root: apt-get install ${names.join(" ")}` +
        (existsSync("/usr/bin/apt-get") ? "" : " (or the packages of the same names on your distribution)"),
    );
  }
  await step(`Debian packages: ${names.join(" ")}`, async (note) => {
    const quiet = { ...env, DEBIAN_FRONTEND: "noninteractive" };
    await run(["apt-get", "-qq", "update"], { env: quiet, note });
    await run(["apt-get", "-qq", "-y", "--no-install-recommends", "install", ...names], { env: quiet, note });
  });
}

/** Bundles whose inputs changed are built anew. */
export async function ensureBundles(paths, { node, env }) {
  for (const name of ["envd", "host-agent", "control-plane"]) {
    const dir = join(repoDir, "packages", name);
    const wanted = treeDigest([
      dir,
      join(repoDir, "packages", "protocol"),
      join(repoDir, "package-lock.json"),
    ]);
    const stamp = join(paths.stampDir, `bundle-${name}`);
    const have = existsSync(stamp) ? readFileSync(stamp, "utf8") : "";
    if (have === wanted && existsSync(join(dir, "dist"))) continue;
    await step(`bundle of ${name}`, async (note) => {
      await run([node, join(dir, "build.mjs")], { cwd: dir, env, note });
      writeFileSync(stamp, wanted);
    });
  }
}

function treeDigest(roots) {
  const hash = createHash("sha256").update(NODE_VERSION);
  const visit = (path) => {
    const stat = statSync(path);
    if (!stat.isDirectory()) {
      hash.update(path).update("\0").update(readFileSync(path));
      return;
    }
    for (const name of readdirSync(path).toSorted?.() ?? readdirSync(path).sort()) {
      if (name === "dist" || name === "node_modules" || name.endsWith(".test.ts")) continue;
      visit(join(path, name));
    }
  };
  roots.forEach(visit);
  return hash.digest("hex");
}
