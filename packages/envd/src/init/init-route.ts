/**
 * POST /init: how a clone becomes somebody.
 *
 * envd cannot see a restore happen: it is frozen in the middle of its life and
 * goes on, in a template before any /init, in a paused sandbox or a snapshot
 * with the settings of the sandbox that it was. The host does not always know
 * those (a snapshot's child has another token), so no secret of the old life
 * can be asked for. The rule is therefore:
 *
 *   An /init is accepted when it comes from the host's address and its
 *   restoreId is new. It closes envd, takes effect as a whole, and only then
 *   opens envd with the new settings. The same restoreId again is answered 204
 *   and changes nothing; one that came before the present one is a 409, so a
 *   delayed repetition never brings an old life back.
 *
 * It is safe because the host's address is the gateway's: the kernel drops
 * packets from the wire that claim one of the guest's own addresses, and a
 * user process that connects to envd comes from one of those. Only the guest's
 * root can take the gateway's address itself, and root needs no /init to do
 * what it likes with envd. What the host forwards for others (port proxies)
 * bears its address too: THE HOST MUST NOT FORWARD /init.
 */
import type { IncomingMessage, ServerResponse } from "node:http";
import { HttpError, messageOf } from "../errors.ts";
import type { GuestState } from "../guest-state.ts";
import { sendNothing } from "../http-answer.ts";
import { MAX_INIT_BYTES } from "../limits.ts";
import { ENVD_VERSION } from "../version.ts";
import { InitStepError, applyInit } from "./apply-init.ts";
import type { InitDeps } from "./apply-init.ts";
import { initRequestSchema, parseTimestamp } from "./init-request.ts";
import type { InitRequest } from "./init-request.ts";

/** Each restore adds one; a sandbox sees a few. The bound only matters to a host gone mad. */
const MAX_REMEMBERED = 1024;

export class InitRoute {
  readonly #deps: InitDeps & { state: GuestState; hostAddresses: ReadonlySet<string> };
  #current: string | undefined;
  readonly #past = new Set<string>();

  constructor(deps: InitDeps & { state: GuestState; hostAddresses: ReadonlySet<string> }) {
    this.#deps = deps;
  }

  async handle(request: IncomingMessage, response: ServerResponse): Promise<void> {
    const from = request.socket.remoteAddress ?? "";
    if (!this.#deps.hostAddresses.has(from)) throw new HttpError(401, "init is for the host alone");
    const init = parse(await readBody(request));
    // No await from here on: two requests never mix.
    this.#accept(init);
    response.setHeader("X-Envd-Version", ENVD_VERSION);
    sendNothing(response);
  }

  #accept(init: InitRequest): void {
    const { state } = this.#deps;
    if (init.restoreId === this.#current && state.settings !== undefined) return;
    if (this.#past.has(init.restoreId)) {
      throw new HttpError(409, "init is of an earlier restore");
    }
    state.close();
    if (this.#current !== undefined && this.#current !== init.restoreId) this.#remember(this.#current);
    this.#current = init.restoreId;
    try {
      applyInit(init, this.#deps);
    } catch (error) {
      if (error instanceof InitStepError) throw new HttpError(500, error.message, { cause: error });
      throw error;
    }
    const { accessToken, envVars, defaultUser, defaultWorkdir } = init;
    state.open({ accessToken, envVars, defaultUser, defaultWorkdir });
  }

  #remember(restoreId: string): void {
    this.#past.add(restoreId);
    for (const oldest of this.#past) {
      if (this.#past.size <= MAX_REMEMBERED) return;
      this.#past.delete(oldest);
    }
  }
}

async function readBody(request: IncomingMessage): Promise<string> {
  const chunks: Buffer[] = [];
  let bytes = 0;
  for await (const chunk of request.iterator({ destroyOnReturn: false }) as AsyncIterable<Buffer>) {
    bytes += chunk.byteLength;
    if (bytes > MAX_INIT_BYTES) throw new HttpError(413, `init exceeds ${MAX_INIT_BYTES} bytes`);
    chunks.push(chunk);
  }
  return Buffer.concat(chunks).toString("utf8");
}

function parse(text: string): InitRequest {
  let body: unknown;
  try {
    body = JSON.parse(text);
  } catch (error) {
    throw new HttpError(400, "init is not JSON", { cause: error });
  }
  const result = initRequestSchema.safeParse(body);
  if (!result.success) {
    const [issue] = result.error.issues;
    throw new HttpError(400, `init: ${issue!.path.join(".")}: ${issue!.message}`);
  }
  try {
    parseTimestamp(result.data.timestamp);
  } catch (error) {
    throw new HttpError(400, `init: timestamp: ${messageOf(error)}`, { cause: error });
  }
  return result.data;
}
