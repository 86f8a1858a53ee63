import assert from "node:assert/strict";
import { test } from "vitest";
import { shareWork } from "./share-work.ts";

/** Work that ends when told, or some time after it was aborted. */
function controlledWork(): {
  begun: { key: string; signal: AbortSignal; done: PromiseWithResolvers<string> }[];
  share: (key: string, signal: AbortSignal) => Promise<string>;
} {
  const begun: { key: string; signal: AbortSignal; done: PromiseWithResolvers<string> }[] = [];
  const share = shareWork((key, signal) => {
    const done = Promise.withResolvers<string>();
    signal.addEventListener("abort", () => done.reject(signal.reason));
    begun.push({ key, signal, done });
    return done.promise;
  });
  return { begun, share };
}

const never = new AbortController().signal;

test("those who ask for the same at the same time share one piece of work", async () => {
  const { begun, share } = controlledWork();
  const answers = Promise.all([share("a", never), share("a", never), share("b", never)]);
  assert.deepEqual(
    begun.map(({ key }) => key),
    ["a", "b"],
  );
  begun[0]?.done.resolve("A");
  begun[1]?.done.resolve("B");
  assert.deepEqual(await answers, ["A", "A", "B"]);
});

test("after the end the next one begins anew, also after a failure", async () => {
  const { begun, share } = controlledWork();
  const first = share("a", never);
  begun[0]?.done.reject(new Error("no disk"));
  await assert.rejects(first, /no disk/);
  const second = share("a", never);
  begun[1]?.done.resolve("A");
  assert.equal(await second, "A");
});

test("one who leaves does not end the work of the others", async () => {
  const { begun, share } = controlledWork();
  const leaving = new AbortController();
  const left = share("a", leaving.signal);
  const stays = share("a", never);
  leaving.abort(new Error("tired"));
  await assert.rejects(left, /tired/);
  assert.equal(begun[0]?.signal.aborted, false);
  begun[0]?.done.resolve("A");
  assert.equal(await stays, "A");
});

test("when the last has left the work is aborted, and who comes then waits for its undoing", async () => {
  const undone = Promise.withResolvers<void>();
  let runs = 0;
  const share = shareWork(async (_key, signal) => {
    runs += 1;
    if (runs > 1) return "again";
    const { promise, resolve } = Promise.withResolvers<void>();
    signal.addEventListener("abort", () => resolve());
    await promise;
    await undone.promise;
    throw signal.reason;
  });
  const leaving = new AbortController();
  const left = share("a", leaving.signal);
  leaving.abort(new Error("tired"));
  const next = share("a", never);
  assert.equal(runs, 1);
  undone.resolve();
  await assert.rejects(left, /tired/);
  assert.equal(await next, "again");
});
