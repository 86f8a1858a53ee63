/** What agent and database must both compute, to the letter. */
import type { DigestedSandbox } from "../sandbox-digest.ts";

export interface SandboxDigestVector {
  name: string;
  sandboxes: readonly DigestedSandbox[];
  digest: string;
}

const A = "sbaaaaaaaaaaaaaaaaaa";
const B = "sbbbbbbbbbbbbbbbbbbb";
const C = "sb0123456789abcdefgh";

export const SANDBOX_DIGEST_VECTORS: readonly SandboxDigestVector[] = [
  { name: "no sandbox", sandboxes: [], digest: "x1:0000000000000000" },
  {
    name: "one that runs: printf sbaaaaaaaaaaaaaaaaaa:running:1 | sha256sum | cut -c1-16",
    sandboxes: [{ id: A, status: "running", generation: 1n }],
    digest: "x1:44371cb6e331299f",
  },
  {
    name: "two, with the highest bit set",
    sandboxes: [
      { id: B, status: "paused", generation: 12n },
      { id: A, status: "running", generation: 1n },
    ],
    digest: "x1:88a2d795a5385ca9",
  },
  {
    name: "work under way is nothing",
    sandboxes: [
      { id: A, status: "running", generation: 1n },
      { id: B, status: "pausing", generation: 12n },
      { id: C, status: "starting", generation: 1n },
    ],
    digest: "x1:44371cb6e331299f",
  },
  {
    name: "the highest generation",
    sandboxes: [{ id: C, status: "running", generation: 9_223_372_036_854_775_807n }],
    digest: "x1:2846a28cdd621455",
  },
  {
    name: "one that is missing, which no host can say",
    sandboxes: [{ id: A, status: "missing", generation: 3n }],
    digest: "x1:4b56a7eba6aacc19",
  },
  {
    name: "zeros in front",
    sandboxes: [{ id: C, status: "running", generation: 1_402n }],
    digest: "x1:000548370a9bc292",
  },
];
