/**
 * The guest image for tests that boot real guests: built once per checkout,
 * below .rookery/test, from the envd of this checkout. Nothing of a running
 * product is touched, and suites that ask at the same time wait for one build.
 */
import { join } from "node:path";
import { buildEnvd } from "../../../../envd/build.mjs";
import { removeTree } from "../../host/atomic-file.ts";
import { run } from "../../host/run.ts";
import type { GuestImage } from "../guest-image.ts";
import type { ImageStoreOptions } from "../image-store.ts";
import { openImageStore } from "../image-store.ts";

const REPOSITORY_DIR = join(import.meta.dirname, "../../../../..");
const KEEP_OLD_MS = 3_600_000;
export const TEST_DATA_DIR = join(REPOSITORY_DIR, ".rookery/test");

/** All but the progress callback, for tests that open a store of their own. */
export async function testImageStoreOptions(imagesDir: string): Promise<ImageStoreOptions> {
  // One folder per process: another suite may be reading what we would overwrite.
  const envdBundleDir = join(TEST_DATA_DIR, `envd-${process.pid}`);
  await buildEnvd(envdBundleDir);
  return {
    imagesDir,
    envdBundleDir,
    guestFilesDir: join(REPOSITORY_DIR, "packages/guest-image"),
    nodeBinary: process.execPath,
    run,
    clock: Date,
  };
}

export async function testImage(signal: AbortSignal): Promise<GuestImage> {
  const options = await testImageStoreOptions(join(TEST_DATA_DIR, "images"));
  try {
    const store = await openImageStore(options);
    const image = await store.ensure("base", signal);
    // Every change of envd leaves an image behind; young ones may be another suite's.
    for (const { hash, createdAt } of await store.list()) {
      if (hash !== image.hash && Date.now() - createdAt.getTime() > KEEP_OLD_MS) await store.remove(hash);
    }
    return image;
  } finally {
    await removeTree(options.envdBundleDir);
  }
}
