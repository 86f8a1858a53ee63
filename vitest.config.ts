/**
 * Suites, by what they need:
 *   unit  *.test.ts        nothing but Node
 *   db    *.db.test.ts     the real PostgreSQL server out of its npm package
 *   host  *.host.test.ts   root, namespaces, a VMM, real guests
 *   e2e   *.e2e.test.ts    the whole product, started as a user would
 */
import { defineConfig } from "vitest/config";

export default defineConfig({
  test: {
    // Ending a product or a server takes longer than the default of 10 s on a busy
    // machine, and what is cut off there is left behind without a word.
    teardownTimeout: 120_000,
    projects: [
      {
        test: {
          name: "unit",
          include: ["packages/*/src/**/*.test.ts", "scripts/**/*.test.ts"],
          exclude: ["**/*.{db,host,e2e}.test.ts", "**/node_modules/**"],
          pool: "forks",
        },
      },
      {
        test: {
          name: "db",
          include: ["packages/*/src/**/*.db.test.ts", "test/{faults,processes}/*.db.test.ts"],
          globalSetup: ["packages/control-plane/src/db/testing/global-setup.ts"],
          pool: "forks",
          testTimeout: 30_000,
          hookTimeout: 60_000,
        },
      },
      {
        test: {
          name: "host",
          include: ["packages/*/src/**/*.host.test.ts"],
          pool: "forks",
          // Guests share two cores under TCG: side by side they only get slower.
          fileParallelism: false,
          testTimeout: 180_000,
          hookTimeout: 300_000,
        },
      },
      {
        test: {
          name: "e2e",
          globalSetup: ["test/setup.ts"],
          include: ["test/**/*.e2e.test.ts"],
          pool: "forks",
          fileParallelism: false,
          testTimeout: 300_000,
          hookTimeout: 600_000,
        },
      },
    ],
  },
});
