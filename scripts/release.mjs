/**
 * `npm run release [-- --out DIR]`: what a machine without this clone needs, as
 * one folder and one archive: Node, the control plane, the agent with the parts
 * of its guest image, and `deploy/`. Defaults to `.rookery/release/`.
 *
 * The layout is the clone's own, so programs find each other as they do there.
 */
import {
  chmodSync,
  cpSync,
  existsSync,
  mkdirSync,
  readFileSync,
  renameSync,
  rmSync,
  writeFileSync,
} from "node:fs";
import { join, resolve } from "node:path";
import { parseArgs } from "node:util";
import { productPaths, repoDir } from "./bootstrap/paths.mjs";
import { ensureBundles, prepareTools } from "./bootstrap/prepare.mjs";
import { say, step } from "./bootstrap/progress.mjs";
import { StepError, run } from "./bootstrap/run.mjs";

const { values: flags } = parseArgs({
  options: { out: { type: "string" }, "no-archive": { type: "boolean", default: false } },
});
const { version } = JSON.parse(readFileSync(join(repoDir, "package.json"), "utf8"));
const name = `rookery-${version}-linux-${process.arch}`;
const out = resolve(flags.out ?? join(repoDir, ".rookery", "release"));

const PARTS = [
  "packages/control-plane/dist",
  "packages/host-agent/dist",
  "packages/envd/dist",
  "packages/guest-image",
  "deploy",
  "LICENSE",
];
const PROGRAMS = {
  "rookery-agent": "packages/host-agent/dist/rookery-agent.mjs",
  "rookery-control-plane": "packages/control-plane/dist/control-plane.mjs",
};

try {
  const paths = productPaths();
  const { node, env } = await prepareTools(paths);
  await ensureBundles(paths, { node, env });
  const tree = await step("release folder", () => writeTree(node));
  if (!flags["no-archive"]) {
    const archive = `${tree}.tar.gz`;
    await step("archive", () =>
      run(["tar", "-C", out, "--owner=0", "--group=0", "-czf", archive, name], { env }),
    );
    say(archive);
  }
  say(tree);
} catch (cause) {
  if (!(cause instanceof StepError)) throw cause;
  say(`\n${cause.message}`);
  process.exitCode = 1;
}

/** Under another name until it is whole. */
async function writeTree(node) {
  const tree = join(out, name);
  const fresh = `${tree}.new`;
  rmSync(fresh, { recursive: true, force: true });
  mkdirSync(join(fresh, "bin"), { recursive: true });
  for (const part of PARTS) {
    cpSync(join(repoDir, part), join(fresh, part), {
      recursive: true,
      filter: (source) => !source.endsWith("/node_modules") && !source.endsWith(".test.ts"),
    });
  }
  writeFileSync(join(fresh, "VERSION"), `${version}\n`);
  cpSync(node, join(fresh, "bin", "node"));
  for (const [program, file] of Object.entries(PROGRAMS)) {
    if (!existsSync(join(fresh, file))) throw new StepError(`${file} is not in the release`);
    const path = join(fresh, "bin", program);
    writeFileSync(
      path,
      `#!/bin/sh\nhere=$(dirname "$(readlink -f "$0")")\nexec "$here/node" "$here/../${file}" "$@"\n`,
    );
    chmodSync(path, 0o755);
  }
  // Readable for the unprivileged user that runs the control plane, whatever our umask.
  await run(["chmod", "-R", "u=rwX,go=rX", fresh]);
  rmSync(tree, { recursive: true, force: true });
  renameSync(fresh, tree);
  return tree;
}
