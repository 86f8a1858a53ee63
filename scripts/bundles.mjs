/** `node scripts/bundles.mjs`: the programs' bundles, where they are not what the sources say. */
import { productPaths } from "./bootstrap/paths.mjs";
import { ensureBundles, prepareTools } from "./bootstrap/prepare.mjs";

const paths = productPaths();
await ensureBundles(paths, await prepareTools(paths));
