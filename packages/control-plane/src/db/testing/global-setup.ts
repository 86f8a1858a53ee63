/**
 * One real server per run of the database suites, fsync on. Test files find the
 * template database's address by vitest's `inject`.
 */
import type { TestProject } from "vitest/node";
import { startTestServer } from "./test-server.ts";

declare module "vitest" {
  export interface ProvidedContext {
    postgresSocketDir: string;
  }
}

export default async function setup(project: TestProject): Promise<() => Promise<void>> {
  const server = await startTestServer();
  project.provide("postgresSocketDir", server.socketDir);
  return () => server.stop();
}
