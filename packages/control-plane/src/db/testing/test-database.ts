/**
 * A database of its own for each test file, copied from the migrated template.
 */
import { randomBytes } from "node:crypto";
import { Client } from "pg";
import { afterAll, beforeAll, inject } from "vitest";
import { type OpenDatabase, openDatabase } from "../database.ts";
import { urlOf } from "../embedded-postgres.ts";
import { TEMPLATE_DATABASE } from "./test-server.ts";

export interface TestDatabase extends OpenDatabase {
  url: string;
}

/** Call it at the top of a test file; the answer's fields are there once the tests run. */
export function useTestDatabase(): TestDatabase {
  const held = {} as TestDatabase;
  const name = `test_${randomBytes(8).toString("hex")}`;
  beforeAll(async () => {
    const url = await createDatabase(name);
    Object.assign(held, openTestDatabase(url), { url });
  });
  afterAll(async () => {
    await held.close();
    await asAdmin(`drop database ${name} with (force)`);
  });
  return held;
}

/** Another pool on the same database, as another replica would have. */
export function openTestDatabase(url: string): OpenDatabase {
  return openDatabase({
    url,
    maxConnections: 10,
    connectTimeoutMs: 5_000,
    statementTimeoutMs: 10_000,
    onError: (cause) => {
      throw cause;
    },
  });
}

async function createDatabase(name: string): Promise<string> {
  await asAdmin(`create database ${name} template ${TEMPLATE_DATABASE}`);
  return urlOf(inject("postgresSocketDir"), name);
}

async function asAdmin(statement: string): Promise<void> {
  const client = new Client({ connectionString: urlOf(inject("postgresSocketDir"), "postgres") });
  await client.connect();
  try {
    await client.query(statement);
  } finally {
    await client.end();
  }
}
