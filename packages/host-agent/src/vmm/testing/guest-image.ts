/** The guest image that tests on real guests use: built once per checkout, as the product builds its own. */
import { testImage } from "../../image/testing/test-image.ts";
import type { BootFiles } from "../vmm.ts";

export interface TestImage {
  hash: string;
  boot: BootFiles;
  rootDisk: { path: string; sizeBytes: number };
}

/** A first build takes some two minutes. */
const BUILD_MS = 600_000;

export async function guestForTests(): Promise<TestImage> {
  const { hash, kernel, initrd, cmdline, rootDisk } = await testImage(AbortSignal.timeout(BUILD_MS));
  return { hash, boot: { kernel, initrd, cmdline }, rootDisk };
}
