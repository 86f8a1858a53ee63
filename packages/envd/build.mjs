/**
 * Builds envd for guests of this machine's architecture: `envd.mjs`, one file
 * with all that it imports, and beside it `koffi.node`, which no bundle can
 * hold. Run it (`node packages/envd/build.mjs [FOLDER]`) or import `buildEnvd`.
 */
import { copyFile, mkdir } from "node:fs/promises";
import { createRequire } from "node:module";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { build } from "esbuild";

const here = import.meta.dirname;

/**
 * Options of Node that envd should be started with: no V8 helper threads (a
 * guest has few CPUs, and each thread costs stacks and arenas), and a young
 * generation that stays small, because each page that it ever touched is a
 * page that a clone dirties again.
 */
export const ENVD_NODE_OPTIONS = ["--v8-pool-size=0", "--no-memory-reducer", "--max-semi-space-size=1"];

/** Writes into `outDir`, which it makes; returns the files' paths. */
export async function buildEnvd(outDir, { arch = process.arch } = {}) {
  await mkdir(outDir, { recursive: true });
  const bundle = join(outDir, "envd.mjs");
  await build({
    entryPoints: [join(here, "src/main.ts")],
    outfile: bundle,
    bundle: true,
    platform: "node",
    target: "node24",
    format: "esm",
    minifySyntax: true,
    minifyWhitespace: true,
    legalComments: "none",
    // CommonJS packages in the bundle ask for Node's modules by `require`.
    banner: { js: 'import{createRequire as $r}from"node:module";const require=$r(import.meta.url);' },
    logLevel: "warning",
  });
  const native = join(outDir, "koffi.node");
  await copyFile(nativeModule(arch), native);
  return { bundle, native };
}

/** koffi keeps its native files in one package for each platform. */
function nativeModule(arch) {
  const name = `@koromix/koffi-linux-${arch}`;
  const require = createRequire(import.meta.url);
  return join(require.resolve(`${name}/package.json`), "..", `linux_${arch}`, "koffi.node");
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const files = await buildEnvd(process.argv[2] ?? join(here, "dist"));
  process.stdout.write(`${Object.values(files).join("\n")}\n`);
}
