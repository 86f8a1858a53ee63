/**
 * Pause, end of the process, resume, again and again, under load in the guest:
 * what programs hold in memory and on disk stays whole, and a layer stays as
 * large as what differs from the template, not as the number of rounds.
 *
 * Five rounds with one vCPU; ROOKERY_LONG=1 makes it 25, and 25 more with two.
 */
import assert from "node:assert/strict";
import { afterAll, beforeAll, describe, test } from "vitest";
import { run } from "../../host/run.ts";
import { guestForTests } from "../testing/guest-image.ts";
import { openQemuTestBed, type QemuTestBed } from "../testing/qemu-test-bed.ts";
import { TestSandboxes } from "../testing/test-sandboxes.ts";

const image = await guestForTests();
const LONG = process.env["ROOKERY_LONG"] === "1";
const ROUNDS = LONG ? 25 : 5;
/** What the guest's programs dirty afresh in each round. */
const ROUND_BYTES = 700_000;
const MIB = 1 << 20;

describe.each(LONG ? [1, 2] : [1])("chained pauses of a guest with %d vCPU", (vcpus) => {
  let bed: QemuTestBed;
  let sandboxes: TestSandboxes;
  beforeAll(async () => {
    bed = await openQemuTestBed(image, { shape: { vcpus, memoryMb: 512 } });
    sandboxes = await TestSandboxes.open(bed);
  });
  afterAll(async () => {
    await sandboxes.clear();
    await bed[Symbol.asyncDispose]();
  });

  test(
    `memory, processes and disk are whole after ${ROUNDS} rounds`,
    async () => {
      let sandbox = await sandboxes.start();
      // A writer whose file has each number once and in order, and one that keeps the file system busy.
      await bed.exec(
        sandbox.vm,
        `mkdir -p /root/t
         setsid sh -c 'i=0; while :; do i=$((i+1)); echo $i >> /root/t/seq; [ $((i % 20)) -ne 0 ] || sleep 0.05; done' </dev/null >/dev/null 2>&1 &
         setsid sh -c 'while :; do head -c 300000 /dev/urandom > /root/t/new; sync /root/t/new; mv /root/t/new /root/t/busy; sleep 0.3; done' </dev/null >/dev/null 2>&1 &`,
      );
      const sums = new Map<string, string>();
      let ticks = 0;
      for (let round = 1; round <= ROUNDS; round += 1) {
        const files = [`/dev/shm/m${round}`, `/root/t/d${round}`];
        const written = await bed.exec(
          sandbox.vm,
          `for f in ${files.join(" ")}; do head -c ${ROUND_BYTES} /dev/urandom > $f; done; sha256sum ${files.join(" ")}`,
        );
        for (const line of written.trim().split("\n")) {
          const [sum = "", file = ""] = line.split(/\s+/);
          sums.set(file, sum);
        }
        ticks = await bed.guest.ticks(sandbox.vm);

        const paused = await sandboxes.pause(sandbox);
        const dirtiedBytes = 2 * ROUND_BYTES * round;
        assert.ok(
          paused.layer.allocatedBytes < 48 * MIB + 2 * dirtiedBytes,
          `after round ${round} the layer takes ${paused.layer.allocatedBytes} bytes`,
        );
        // By the root disk's own file, as a person would look at it.
        const top = `${paused.disk.dir}/top-${paused.disk.chain.length}/disk.qcow2`;
        await run(["qemu-img", "check", "-q", top], { timeoutMs: 60_000 });

        sandbox = await sandboxes.resume(paused);
        await sandboxes.clear(sandbox.vm);
        const found = await bed.exec(sandbox.vm, `sha256sum ${[...sums.keys()].join(" ")}`);
        for (const line of found.trim().split("\n")) {
          const [sum = "", file = ""] = line.split(/\s+/);
          assert.equal(sum, sums.get(file), `${file} after round ${round}`);
        }
        const order = await bed.exec(
          sandbox.vm,
          `awk 'NR != $1 { bad++ } END { print bad + 0 }' /root/t/seq`,
        );
        assert.equal(order.trim(), "0", `the sequence is broken after round ${round}`);
        assert.ok((await bed.guest.ticks(sandbox.vm)) >= ticks);
        const complaints = await bed.exec(
          sandbox.vm,
          `dmesg | grep -iE 'I/O error|EXT4-fs (error|warning)|BUG:|hung_task|corrupt' | head -3 || true`,
        );
        assert.equal(complaints.trim(), "");
      }
    },
    ROUNDS * 120_000,
  );
});
