/** `npm run bench -- NAME…`: prepares the tools, then bench/main.ts. */
import { spawn } from "node:child_process";
import { once } from "node:events";
import { join } from "node:path";
import { productPaths, repoDir } from "./bootstrap/paths.mjs";
import { ensureBundles, ensureDebianPackages, prepareTools } from "./bootstrap/prepare.mjs";

const paths = productPaths();
const { node, env } = await prepareTools(paths);
await ensureDebianPackages(env);
await ensureBundles(paths, { node, env });
const child = spawn(node, [join(repoDir, "bench", "main.ts"), ...process.argv.slice(2)], {
  env,
  stdio: "inherit",
});
const [code] = await once(child, "exit");
process.exitCode = code ?? 1;
