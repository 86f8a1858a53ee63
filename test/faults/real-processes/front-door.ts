/**
 * The way from agents to replicas, as an operator would set one up: TLS, and
 * each request to whichever replica. It repeats nothing, and says 502 where a
 * replica does not answer.
 *
 * It sees credentials pass, so the watch on them is here.
 */
import { execFileSync } from "node:child_process";
import { once } from "node:events";
import { readFileSync } from "node:fs";
import type { IncomingMessage } from "node:http";
import { type Server, createServer } from "node:https";
import { join } from "node:path";
import { z } from "zod";
import { CredentialWatch } from "../in-process/credentials.ts";
import type { Random } from "../random.ts";
import type { ApiAnswer } from "../world.ts";
import { httpCall, readText } from "./http-call.ts";
import { API_PORT, FRONT_DOOR_PORT } from "./settings.ts";
import type { Topology } from "./topology.ts";

export interface Authority {
  key: Buffer;
  cert: Buffer;
  certFile: string;
}

const refreshBody = z.object({ refresh_token: z.string() });
const registerBody = z.object({ token: z.string(), public_key: z.string() });

export function makeAuthority(dir: string, addresses: readonly string[]): Authority {
  const [keyFile, certFile] = [join(dir, "front-door.key"), join(dir, "front-door.pem")];
  const kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"];
  const names = addresses.map((address) => `IP:${address}`).join(",");
  const subject = ["-subj", "/CN=front-door", "-addext", `subjectAltName=${names}`];
  execFileSync("openssl", ["req", "-x509", ...kind, "-keyout", keyFile, "-out", certFile, ...subject], {
    stdio: "ignore",
  });
  return { key: readFileSync(keyFile), cert: readFileSync(certFile), certFile };
}

export class FrontDoor implements AsyncDisposable {
  readonly #topology: Topology;
  readonly #random: Random;
  readonly #server: Server;
  readonly #patienceMs: number;
  readonly credentials = new CredentialWatch();
  /** By host: refresh tokens that it was given, oldest first. */
  readonly refreshTokens: string[][];

  private constructor(
    topology: Topology,
    options: { random: Random; authority: Authority; patienceMs: number },
  ) {
    const { key, cert } = options.authority;
    this.#topology = topology;
    this.#random = options.random;
    this.#patienceMs = options.patienceMs;
    this.refreshTokens = topology.hosts.map(() => []);
    this.#server = createServer({ key, cert }, (request, response) => {
      // Whoever gave up does not hear that.
      response.on("error", () => undefined);
      void this.#pass(request).then(({ status, body }) => {
        response.writeHead(status, { "content-type": "application/json" });
        response.end(JSON.stringify(body ?? null));
      });
    });
  }

  static async open(
    topology: Topology,
    options: { random: Random; authority: Authority; patienceMs: number },
  ): Promise<FrontDoor> {
    const door = new FrontDoor(topology, options);
    door.#server.listen(FRONT_DOOR_PORT, topology.center);
    await once(door.#server, "listening");
    return door;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#server.closeAllConnections();
    this.#server.close();
    await once(this.#server, "close");
  }

  async #pass(request: IncomingMessage): Promise<ApiAnswer> {
    const host = this.#topology.hosts.findIndex(({ address }) => address === request.socket.remoteAddress);
    try {
      const text = await readText(request);
      const path = request.url ?? "";
      const replica = this.#random.between(0, this.#topology.replicas.length - 1);
      const deliver = () =>
        httpCall({
          host: this.#topology.replicas[replica]!.address,
          port: API_PORT,
          localAddress: this.#topology.doors[host]!,
          method: "POST",
          path,
          headers: { authorization: request.headers.authorization },
          text,
          patienceMs: this.#patienceMs,
        });
      const answer = await this.#watched(path, text, deliver);
      const given = refreshBody.safeParse(answer.body);
      if (answer.status < 300 && given.success) this.refreshTokens[host]!.push(given.data.refresh_token);
      return answer;
    } catch (cause) {
      return {
        status: 502,
        body: { error: { code: "unavailable", message: `bad gateway: ${String(cause)}` } },
      };
    }
  }

  async #watched(path: string, text: string, deliver: () => Promise<ApiAnswer>): Promise<ApiAnswer> {
    if (path.endsWith("/auth/refresh")) {
      return await this.credentials.refresh(refreshBody.parse(JSON.parse(text)).refresh_token, deliver);
    }
    if (path.endsWith("/register")) {
      return await this.credentials.register(registerBody.parse(JSON.parse(text)), deliver);
    }
    return await deliver();
  }
}
