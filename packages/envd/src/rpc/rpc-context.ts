/** What a method knows of its call besides the message. */
import type { IncomingHttpHeaders, ServerResponse } from "node:http";
import { Code, ConnectError } from "@connectrpc/connect";
import { MAX_TIMEOUT_MS } from "../limits.ts";

export class RpcContext {
  readonly headers: IncomingHttpHeaders;
  /** How long the client allows; undefined: for ever. */
  readonly timeoutMs: number | undefined;
  readonly #response: ServerResponse;
  readonly #deadline: NodeJS.Timeout | undefined;
  #controller: AbortController | undefined;
  #reason: ConnectError | undefined;

  constructor(headers: IncomingHttpHeaders, response: ServerResponse) {
    this.headers = headers;
    this.timeoutMs = parseTimeout(headers["connect-timeout-ms"]);
    this.#response = response;
    response.once("close", this.#onClose);
    if (this.timeoutMs !== undefined) {
      this.#deadline = setTimeout(
        () => this.#abort(new ConnectError("the operation timed out", Code.DeadlineExceeded)),
        this.timeoutMs,
      );
    }
  }

  /** Aborts at the deadline and when the client goes away. Made on demand: few calls ever wait. */
  get signal(): AbortSignal {
    this.#controller ??= new AbortController();
    if (this.#reason !== undefined) this.#controller.abort(this.#reason);
    return this.#controller.signal;
  }

  /** The call is answered. */
  end(): void {
    clearTimeout(this.#deadline);
    this.#response.off("close", this.#onClose);
  }

  readonly #onClose = (): void => {
    clearTimeout(this.#deadline);
    this.#abort(new ConnectError("the client went away", Code.Canceled));
  };

  #abort(reason: ConnectError): void {
    this.#reason ??= reason;
    this.#controller?.abort(this.#reason);
  }
}

function parseTimeout(header: string | string[] | undefined): number | undefined {
  if (header === undefined) return undefined;
  if (!/^\d{1,10}$/.test(String(header))) {
    throw new ConnectError(`invalid connect timeout value: ${String(header)}`, Code.InvalidArgument);
  }
  // Zero is no timeout: E2B's clients say so.
  const timeoutMs = Number(header);
  return timeoutMs === 0 ? undefined : Math.min(timeoutMs, MAX_TIMEOUT_MS);
}
