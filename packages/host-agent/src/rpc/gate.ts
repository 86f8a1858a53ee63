/**
 * The gate before all calls: who has no valid token gets 401 before a byte of
 * its message is read, and a connection on which nobody was admitted soon ends.
 *
 * Connect would read a whole message first and ask for the token then; on an
 * address that strangers can reach, that is their memory in our process.
 */
import type { Http2ServerRequest, Http2ServerResponse, ServerHttp2Session } from "node:http2";
import { createContextValues } from "@connectrpc/connect";
import type { ContextValues } from "@connectrpc/connect";
import { errorToJsonBytes } from "@connectrpc/connect/protocol-connect";
import { ERRORS, RookeryError } from "@rookery/protocol/errors";
import type { Logger } from "../sandbox-manager/deps.ts";
import type { TokenVerifier, Trust } from "./auth.ts";
import { toConnectError } from "./errors.ts";
import { TRUST } from "./interceptors.ts";

/** From a connection to its first admitted call. The control plane opens one only for a call. */
const STRANGER_MS = 10_000;

type Handler = (request: Http2ServerRequest, response: Http2ServerResponse) => void;

export class Gate {
  readonly #verifier: TokenVerifier;
  readonly #logger: Logger;
  readonly #strangerMs: number;
  readonly #strangers = new WeakMap<ServerHttp2Session, { limit: NodeJS.Timeout; refused: boolean }>();
  readonly #trusts = new WeakMap<object, Trust>();

  constructor(verifier: TokenVerifier, logger: Logger, strangerMs = STRANGER_MS) {
    this.#verifier = verifier;
    this.#logger = logger;
    this.#strangerMs = strangerMs;
  }

  /** To be told of each session as it begins. */
  watch(session: ServerHttp2Session): void {
    const limit = setTimeout(() => session.destroy(), this.#strangerMs).unref();
    this.#strangers.set(session, { limit, refused: false });
    session.once("close", () => clearTimeout(limit));
  }

  /** `handler`, for admitted calls alone. */
  before(handler: Handler): Handler {
    return (request, response) => void this.#admit(request, response, handler);
  }

  /** What the service may know of an admitted request. */
  contextOf(request: object): ContextValues {
    return createContextValues().set(TRUST, this.#trusts.get(request));
  }

  async #admit(request: Http2ServerRequest, response: Http2ServerResponse, handler: Handler): Promise<void> {
    // The client may leave while its token is checked.
    const ignore = (): void => undefined;
    request.on("error", ignore);
    try {
      const trust = await this.#verifier.verify(request.headers.authorization ?? null);
      if (response.stream.destroyed || response.stream.session === undefined) return;
      this.#trusts.set(request, trust);
      clearTimeout(this.#strangers.get(response.stream.session as ServerHttp2Session)?.limit);
      request.off("error", ignore);
      handler(request, response);
    } catch (cause) {
      this.#refuse(request, response, cause);
    }
  }

  #refuse(request: Http2ServerRequest, response: Http2ServerResponse, cause: unknown): void {
    const { stream } = response;
    if (stream.destroyed) return;
    const known = cause instanceof RookeryError;
    const facts = { rpc: request.url.slice(0, 100), from: request.socket.remoteAddress, err: cause };
    const stranger = stream.session && this.#strangers.get(stream.session as ServerHttp2Session);
    // Once a connection: strangers shall not fill our disk with their knocking.
    if (!known) this.#logger.error(facts, "call failed by a fault of ours");
    else if (stranger?.refused === true) this.#logger.debug(facts, "call refused");
    else this.#logger.warn(facts, "call refused");
    if (stranger !== undefined) stranger.refused = true;
    response.writeHead(known ? ERRORS[cause.code].status : 500, { "content-type": "application/json" });
    // Then no more of what it sends is taken: neither read, nor waited for.
    response.end(errorToJsonBytes(toConnectError(cause), undefined), () => stream.close());
  }
}
