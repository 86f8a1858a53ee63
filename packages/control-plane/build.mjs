/**
 * Bundles the control plane into dist/: two programs and the files that they
 * read, so that a copy of that folder runs with nothing but Node. The uid that
 * runs it may not be able to enter the clone.
 */
import { build } from "esbuild";
import { cp, mkdir, rename, rm } from "node:fs/promises";
import { createRequire } from "node:module";
import { dirname, join } from "node:path";

const root = import.meta.dirname;
const target = join(root, "dist");
/** Under another name until it is whole: somebody may be copying the one before. */
const dist = `${target}.${process.pid}.new`;
const require = createRequire(import.meta.url);

await build({
  entryPoints: {
    "control-plane": join(root, "src/main.ts"),
    "postgres-main": join(root, "src/postgres-main.ts"),
  },
  outdir: dist,
  outExtension: { ".js": ".mjs" },
  bundle: true,
  platform: "node",
  format: "esm",
  target: "node24",
  sourcemap: "linked",
  logLevel: "warning",
  // pg's optional native binding.
  external: ["pg-native"],
  // CommonJS packages in an ES module ask for `require` and these names.
  banner: {
    js: [
      'import { createRequire as __createRequire } from "node:module";',
      "const require = __createRequire(import.meta.url);",
      "const __filename = import.meta.filename;",
      "const __dirname = import.meta.dirname;",
    ].join("\n"),
  },
});
await cp(join(root, "src/db/migrations"), join(dist, "migrations"), { recursive: true });
await cp(join(root, "src/api/static"), join(dist, "assets/pages"), { recursive: true });

const swagger = dirname(require.resolve("swagger-ui-dist/package.json"));
await mkdir(join(dist, "assets/swagger-ui"), { recursive: true });
for (const file of ["swagger-ui.css", "swagger-ui-bundle.js", "LICENSE"]) {
  await cp(join(swagger, file), join(dist, "assets/swagger-ui", file));
}

await rm(target, { recursive: true, force: true });
await rename(dist, target);
