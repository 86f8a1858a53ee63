/**
 * Builds the agent: `dist/rookery-agent.mjs`, one file with all that it imports,
 * and beside it `koffi.node`, which no bundle can hold. Both know each other by
 * place alone, so the folder may be copied anywhere.
 */
import { copyFile, mkdir } from "node:fs/promises";
import { createRequire } from "node:module";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { build } from "esbuild";

const here = import.meta.dirname;

/** Writes into `outDir`, which it makes; returns the bundle's path. */
export async function buildAgent(outDir) {
  await mkdir(outDir, { recursive: true });
  const bundle = join(outDir, "rookery-agent.mjs");
  await build({
    entryPoints: [join(here, "src", "main.ts")],
    outfile: bundle,
    bundle: true,
    platform: "node",
    target: "node24",
    format: "esm",
    minifySyntax: true,
    legalComments: "linked",
    // pino and other CommonJS packages in the bundle ask for Node's modules by `require`.
    banner: {
      js: 'import { createRequire as $createRequire } from "node:module"; const require = $createRequire(import.meta.url);',
    },
    plugins: [koffiBesideBundle],
    logLevel: "warning",
  });
  await copyFile(koffiBinary(), join(outDir, "koffi.node"));
  return bundle;
}

/**
 * koffi's JavaScript looks for its native file through its package's folder,
 * which a bundle does not have. The native module alone is its whole API.
 */
const koffiBesideBundle = {
  name: "koffi-beside-bundle",
  setup({ onResolve, onLoad }) {
    onResolve({ filter: /^koffi$/ }, () => ({ path: "koffi", namespace: "beside-bundle" }));
    onLoad({ filter: /^koffi$/, namespace: "beside-bundle" }, () => ({
      contents: `
        import { createRequire } from "node:module";
        export default createRequire(import.meta.url)("./koffi.node");`,
    }));
  },
};

function koffiBinary() {
  const name = `@koromix/koffi-linux-${process.arch}`;
  const require = createRequire(import.meta.url);
  return join(require.resolve(`${name}/package.json`), "..", `linux_${process.arch}`, "koffi.node");
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  console.log(await buildAgent(process.argv[2] ?? join(here, "dist")));
}
