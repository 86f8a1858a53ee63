/** `npm run faults -- --seeds N --ops N` or `-- --seed S`: prepares the tools, then test/faults/main.ts. */
import { spawn } from "node:child_process";
import { once } from "node:events";
import { join } from "node:path";
import { productPaths, repoDir } from "./bootstrap/paths.mjs";
import { prepareTools } from "./bootstrap/prepare.mjs";

const { node, env } = await prepareTools(productPaths());
const main = join(repoDir, "test", "faults", "main.ts");
const child = spawn(node, [main, ...process.argv.slice(2)], { env, stdio: "inherit" });
const [code] = await once(child, "exit");
process.exitCode = code ?? 1;
