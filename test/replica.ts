/** Another replica of a product's control plane: the same database and key, another port. */
import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { once } from "node:events";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { Api, eventually } from "./api.ts";
import { freePort } from "./product.ts";
import type { Product } from "./product.ts";

export interface Replica extends AsyncDisposable {
  api: Api;
}

/** Runs `command serve` as the uid of the product's own control plane; by default the same program as that. */
export async function startReplica(product: Product, command?: readonly string[]): Promise<Replica> {
  const { dataDir, env = {} } = product.options;
  const { secret_key: secretKey } = JSON.parse(readFileSync(join(dataDir, "secrets.json"), "utf8")) as {
    secret_key: string;
  };
  const model = product.pid("control-plane");
  const port = await freePort();
  // Not the clone's: that uid may not be able to enter it.
  const [program = "", ...args] = command ?? commandOf(model);
  const child = spawn(program, [...args, "serve"], {
    cwd: "/",
    env: {
      ...env,
      DATABASE_URL: databaseUrlOf(model),
      ROOKERY_SECRET_KEY: secretKey,
      ROOKERY_PORT: String(port),
      ROOKERY_LOG_LEVEL: "error",
    },
    ...ownerOf(model),
    stdio: ["ignore", "inherit", "inherit"],
  });
  let failure: Error | undefined;
  child.once("error", (cause) => {
    failure = cause;
  });
  const url = `http://127.0.0.1:${port}`;
  const end = async (): Promise<void> => {
    child.kill("SIGTERM");
    if (failure) return;
    if (child.exitCode === null && child.signalCode === null) await once(child, "exit");
  };
  try {
    await eventually("the replica is ready", 60_000, () => {
      if (failure) throw failure;
      return fetch(`${url}/readyz`).then(
        ({ ok }) => (ok ? true : undefined),
        () => undefined,
      );
    });
  } catch (cause) {
    await end();
    throw cause;
  }
  return { api: new Api(url, product.api().key), [Symbol.asyncDispose]: end };
}

function commandOf(pid: number): string[] {
  const words = readFileSync(`/proc/${pid}/cmdline`, "utf8").split("\0").slice(0, -1);
  assert.equal(words.pop(), "serve", `${pid} is no control plane`);
  return words;
}

function databaseUrlOf(pid: number): string {
  const environment = readFileSync(`/proc/${pid}/environ`, "utf8").split("\0");
  const entry = environment.find((line) => line.startsWith("DATABASE_URL="));
  assert.ok(entry, "the control plane has no DATABASE_URL");
  return entry.slice("DATABASE_URL=".length);
}

/** The database takes its owner's connections alone. */
function ownerOf(pid: number): { uid: number; gid: number } {
  const status = readFileSync(`/proc/${pid}/status`, "utf8");
  const id = (name: string): number => Number(new RegExp(`^${name}:\\s+(\\d+)`, "m").exec(status)?.[1]);
  return { uid: id("Uid"), gid: id("Gid") };
}
