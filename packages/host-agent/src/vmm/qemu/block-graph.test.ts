import assert from "node:assert/strict";
import { test } from "vitest";
import { chainNodes, newestGeneration, nodeNamesOf } from "./block-graph.ts";

const chain = (files: number) => ({
  kind: "file-chain" as const,
  sizeBytes: 1 << 20,
  nodes: Array.from({ length: files }, (_, depth) => ({
    file: `f${depth}`,
    format: depth === files - 1 ? ("raw" as const) : ("qcow2" as const),
    readOnly: depth > 0,
  })),
});

test("each node is defined before the one that stands on it", () => {
  const seen = new Set<string>();
  for (const node of chainNodes(chain(4), 3, "/vm")) {
    for (const below of [node.file, node.backing]) {
      if (typeof below === "string") assert.ok(seen.has(below), `${node["node-name"]} before ${below}`);
    }
    seen.add(node["node-name"]);
  }
  assert.equal([...seen].at(-1), "t3");
});

test("only the top can be written, and a lone qcow2 follows no name in its header", () => {
  const nodes = chainNodes(chain(3), 1, "/vm");
  assert.deepEqual(
    nodes.filter((node) => node["read-only"] === false).map((node) => node["node-name"]),
    ["t1-file", "t1"],
  );
  const alone = { ...chain(2), nodes: chain(2).nodes.slice(0, 1) };
  assert.equal(chainNodes(alone, 2, "/vm").at(-1)?.backing, null);
});

test("a file's name cannot leave the run directory", () => {
  for (const file of ["../x", "/etc/passwd", "a/b", "", "a\0b", "json:{}"]) {
    const disk = { ...chain(1), nodes: [{ file, format: "raw" as const, readOnly: false }] };
    assert.throws(() => chainNodes(disk, 1, "/vm"), RangeError, file);
  }
  assert.throws(() => chainNodes({ ...chain(1), nodes: [] }, 1, "/vm"), RangeError);
  assert.throws(() => chainNodes(chain(65), 1, "/vm"), RangeError);
});

test("the newest generation is the present one, and its nodes are closed from the top", () => {
  const names = [...chainNodes(chain(12), 2, "/vm"), ...chainNodes(chain(2), 12, "/vm")].map(
    (node) => node["node-name"],
  );
  assert.equal(newestGeneration([...names, "d0", undefined, "t", "t1x"]), 12);
  assert.equal(newestGeneration(["d0"]), undefined);
  assert.deepEqual(nodeNamesOf(12, names), ["t12", "t12-file", "b12-1", "b12-1-file"]);
  const second = nodeNamesOf(2, names);
  assert.equal(second.length, 24);
  assert.deepEqual(second.slice(-2), ["b2-11", "b2-11-file"]);
});
