/**
 * The REST API in front of whichever replica is asked. To build it takes half a
 * second, so a process has one for all replicas of all runs: it calls the
 * services of the request's own replica.
 */
import { AsyncLocalStorage } from "node:async_hooks";
import { pino } from "pino";
import { type Api, buildApi } from "../../../packages/control-plane/src/api/app.ts";
import type { Services } from "../../../packages/control-plane/src/service/services.ts";
import type { ApiAnswer } from "../world.ts";

interface Serving {
  services: Services;
  /** For a line of the API's own log. */
  log(line: string): void;
}

export interface SharedApi {
  app: Api;
  serving: AsyncLocalStorage<Serving>;
}

export async function openSharedApi(): Promise<SharedApi> {
  const serving = new AsyncLocalStorage<Serving>();
  const services = new Proxy({} as Services, {
    get: (_target, name) => {
      const current = serving.getStore()?.services;
      // Fastify looks at what it is given, outside of any request.
      return current === undefined ? undefined : Reflect.get(current, name);
    },
  });
  const app = await buildApi(services, {
    logger: pino({ level: "error" }, { write: (line: string) => serving.getStore()?.log(line) }),
    version: "0.0.0-faults",
    limits: { requestsPerMinute: 0 },
  });
  await app.ready();
  return { app, serving };
}

export async function inject(
  { app, serving }: SharedApi,
  current: Serving,
  request: {
    method: "GET" | "POST" | "PATCH" | "DELETE";
    path: string;
    body?: unknown;
    headers: Record<string, string>;
  },
): Promise<ApiAnswer> {
  const { method, path: url, body, headers } = request;
  // Fastify does nothing until it is waited for, so the wait belongs inside.
  const answer = await serving.run(
    current,
    async () =>
      await app.inject({
        method,
        url,
        headers: { ...headers, ...(body !== undefined && { "content-type": "application/json" }) },
        ...(body !== undefined && { payload: JSON.stringify(body) }),
      }),
  );
  const text = answer.payload;
  return { status: answer.statusCode, body: text === "" ? undefined : JSON.parse(text) };
}
