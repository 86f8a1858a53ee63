/** The `qemu` driver on real guests. */
import { test } from "vitest";
import { findTestImage } from "../testing/guest-image.ts";
import { openQemuTestBed } from "../testing/qemu-test-bed.ts";
import { vmmContract } from "../vmm.contract.ts";

const image = await findTestImage();

if (image === undefined) {
  test.skip("the qemu driver on real guests (no guest image here: `rookery image build` makes one)", () =>
    undefined);
} else {
  vmmContract("qemu", () => openQemuTestBed(image));
}
