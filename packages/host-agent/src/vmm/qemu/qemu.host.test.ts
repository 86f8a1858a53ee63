/** The `qemu` driver on real guests. */
import { guestForTests } from "../testing/guest-image.ts";
import { openQemuTestBed } from "../testing/qemu-test-bed.ts";
import { vmmContract } from "../vmm.contract.ts";

const image = await guestForTests();

vmmContract("qemu", () => openQemuTestBed(image));
