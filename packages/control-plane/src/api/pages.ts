/**
 * What browsers get: the document, Swagger UI at /docs, the console at /test.
 * All scripts and styles are files of this server, so one strict content policy
 * holds for every answer.
 */
import fastifyStatic from "@fastify/static";
import { dirname } from "node:path";
import { fileURLToPath } from "node:url";
import type { Api } from "./context.ts";

export interface AssetDirectories {
  /** docs.html, docs.js, console.html, console.js, console.css. */
  pages: string;
  /** swagger-ui.css and swagger-ui-bundle.js of swagger-ui-dist. */
  swaggerUi: string;
}

export const CONTENT_POLICY = {
  defaultSrc: ["'none'"],
  scriptSrc: ["'self'"],
  styleSrc: ["'self'", "'unsafe-inline'"],
  imgSrc: ["'self'", "data:"],
  connectSrc: ["'self'"],
  baseUri: ["'none'"],
  formAction: ["'none'"],
  frameAncestors: ["'none'"],
};

/** Where they lie in the source tree. */
export function sourceAssets(): AssetDirectories {
  return {
    pages: fileURLToPath(new URL("static/", import.meta.url)),
    swaggerUi: dirname(fileURLToPath(import.meta.resolve("swagger-ui-dist/package.json"))),
  };
}

const FILES: readonly { url: string; directory: keyof AssetDirectories; file: string }[] = [
  { url: "/docs", directory: "pages", file: "docs.html" },
  { url: "/docs/docs.js", directory: "pages", file: "docs.js" },
  { url: "/docs/swagger-ui.css", directory: "swaggerUi", file: "swagger-ui.css" },
  { url: "/docs/swagger-ui-bundle.js", directory: "swaggerUi", file: "swagger-ui-bundle.js" },
  { url: "/test", directory: "pages", file: "console.html" },
  { url: "/test/console.js", directory: "pages", file: "console.js" },
  { url: "/test/console.css", directory: "pages", file: "console.css" },
];

const hidden = { config: { access: "public" }, schema: { hide: true } } as const;

export async function servePages(app: Api, version: string, assets: AssetDirectories): Promise<void> {
  await app.register(fastifyStatic, { root: assets.pages, serve: false });
  for (const { url, directory, file } of FILES) {
    app.get(url, hidden, (_request, reply) => reply.sendFile(file, assets[directory]));
  }

  app.get("/", hidden, async () => ({
    name: "rookery",
    version,
    docs: "/docs",
    console: "/test",
    openapi: "/openapi.json",
  }));

  // Made once: the routes don't change after the start.
  let json = "";
  let yaml = "";
  app.addHook("onReady", async () => {
    json = JSON.stringify(app.swagger());
    yaml = app.swagger({ yaml: true });
  });
  app.get("/openapi.json", hidden, (_request, reply) => reply.type("application/json").send(json));
  app.get("/openapi.yaml", hidden, (_request, reply) => reply.type("application/yaml").send(yaml));
}
