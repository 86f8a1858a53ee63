/** `npm run down`: stops the product of this data directory, sandboxes too. Data stay. */
import { productPaths } from "./bootstrap/paths.mjs";
import { say } from "./bootstrap/progress.mjs";
import { StepError } from "./bootstrap/run.mjs";
import { stopProduct } from "./bootstrap/stop.mjs";

try {
  await stopProduct(productPaths());
} catch (cause) {
  if (!(cause instanceof StepError)) throw cause;
  say(`\n${cause.message}`);
  process.exit(1);
}
