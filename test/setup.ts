/** One product for all end-to-end suites of a run; each suite leaves it without sandboxes. */
import { mkdtempSync } from "node:fs";
import { join } from "node:path";
import type { TestProject } from "vitest/node";
import { Product, freePort, repoDir } from "./product.ts";
import type { ProductOptions } from "./product.ts";

declare module "vitest" {
  interface ProvidedContext {
    product: ProductOptions;
  }
}

export default async function setup(project: TestProject): Promise<() => Promise<void>> {
  const options: ProductOptions = {
    dataDir: mkdtempSync(join(repoDir, ".rookery", "e2e-")),
    port: await freePort(),
    agentPort: await freePort(),
    env: {
      ROOKERY_IMAGE_DIR: join(repoDir, ".rookery", "test", "images"),
      ROOKERY_HEARTBEAT_MS: "1000",
      ROOKERY_OPERATION_LEASE_MS: "5000",
      ROOKERY_HOST_CHECK_MS: "5000",
      ROOKERY_TEST: "1",
    },
  };
  const product = new Product(options);
  console.log(await product.up());
  project.provide("product", options);
  return () => product.remove();
}
