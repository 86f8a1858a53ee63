/** `npm run faults -- --seeds N --ops N` or `-- --seed S`: prepares the tools, then test/faults/main.ts. */
import { spawn } from "node:child_process";
import { once } from "node:events";
import { join } from "node:path";
import { productPaths, repoDir } from "./bootstrap/paths.mjs";
import { ensureBundles, prepareTools } from "./bootstrap/prepare.mjs";

const paths = productPaths();
const args = process.argv.slice(2);
const { node, env } = await prepareTools(paths);
// Real processes are the programs as they are installed.
if (args.join(" ").includes("--form processes") || args.includes("--form=processes")) {
  await ensureBundles(paths, { node, env });
}
const main = join(repoDir, "test", "faults", "main.ts");
const child = spawn(node, [main, ...args], { env, stdio: "inherit" });
const [code] = await once(child, "exit");
process.exitCode = code ?? 1;
