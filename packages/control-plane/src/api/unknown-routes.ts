/** What no route took: 405 with Allow for a known path, OPTIONS of it, else 404. */
import { RookeryError } from "@rookery/protocol/errors";
import type { FastifyReply, FastifyRequest } from "fastify";
import type { Api } from "./context.ts";

export function answerUnknownRoutes(app: Api): void {
  const routes = new Map<string, { pattern: RegExp; methods: Set<string> }>();
  app.addHook("onRoute", ({ method, url }) => {
    const route = routes.get(url) ?? { pattern: patternOf(url), methods: new Set(["OPTIONS"]) };
    for (const name of [method].flat()) route.methods.add(name);
    routes.set(url, route);
  });

  const methodsOf = (path: string): Set<string> => {
    const methods = new Set<string>();
    for (const route of routes.values()) {
      if (!route.pattern.test(path)) continue;
      for (const method of route.methods) methods.add(method);
    }
    return methods;
  };

  app.setNotFoundHandler(async (request: FastifyRequest, reply: FastifyReply) => {
    const [path = ""] = request.url.split(/[?#]/, 1);
    const methods = methodsOf(path);
    // A known method on a known path comes here when the handler itself found nothing, such as a page's file.
    if (methods.size === 0 || methods.has(request.method === "OPTIONS" ? "" : request.method)) {
      throw new RookeryError("not_found", "there is nothing at this path; /docs lists what there is");
    }
    reply.header("allow", [...methods].toSorted().join(", "));
    if (request.method === "OPTIONS") return reply.code(204).send();
    throw new RookeryError("method_not_allowed", `this path takes ${[...methods].toSorted().join(", ")}`);
  });
}

function patternOf(url: string): RegExp {
  const source = url
    .split("/")
    .map((part) => (part.startsWith(":") ? "[^/]+" : part === "*" ? ".*" : part.replaceAll(".", "\\.")))
    .join("/");
  return new RegExp(`^${source}$`);
}
