/**
 * One HTTP/2 connection to a host: opened at the first request, kept alive by
 * pings, replaced when it breaks or the host says goodbye (GOAWAY).
 *
 * Ours instead of connect-node's Http2SessionManager (2.2): that one removes its
 * error listeners before a session has had its last word, and an agent that
 * ends cleanly then brings the whole process down by an uncaught error.
 *
 * Invariant: a session has an error listener as long as it lives.
 */
import {
  type ClientHttp2Session,
  type ClientHttp2Stream,
  type OutgoingHttpHeaders,
  connect,
  constants,
} from "node:http2";
import { RookeryError } from "@rookery/protocol/errors";
import { connectPinned } from "./pinned-connection.ts";

export interface HostSessionOptions {
  authority: string;
  /** SHA-256 of the certificate that it must show; absent: plain HTTP. */
  certificateFingerprint?: string | undefined;
  connectTimeoutMs: number;
  /** A silent connection is asked for a sign of life so often. */
  pingIntervalMs: number;
  pingTimeoutMs: number;
}

/** A session that breaks between its opening and the request is opened anew, so often. */
const MAX_TRIES = 3;
/** What may be on its way to us unread, per file and in all: with HTTP/2's 64 KB a file waits for each of them. */
const STREAM_WINDOW_BYTES = 1 << 20;
const CONNECTION_WINDOW_BYTES = 16 << 20;

/** What connect-node's transport takes as its sessionManager. */
export class HostSession {
  readonly authority: string;
  readonly #options: HostSessionOptions;
  /** What new requests go to. */
  #current: Promise<ClientHttp2Session> | undefined;
  /** All that live, those too that only finish what they began. */
  readonly #live = new Set<ClientHttp2Session>();
  #isClosed = false;

  constructor(options: HostSessionOptions) {
    this.authority = options.authority;
    this.#options = options;
  }

  async request(method: string, path: string, headers: OutgoingHttpHeaders): Promise<ClientHttp2Stream> {
    for (let tries = 1; ; tries++) {
      if (this.#isClosed) throw unreachable(new Error("the client is closed"));
      const current = (this.#current ??= this.#open());
      let session: ClientHttp2Session;
      try {
        session = await current;
      } catch (cause) {
        this.#drop(current);
        throw cause;
      }
      if (isUsable(session)) return session.request({ ...headers, ":method": method, ":path": path });
      this.#drop(current);
      if (tries === MAX_TRIES) throw unreachable(new Error("its connections break at once"));
    }
  }

  /** Pings ask for signs of life whether or not bytes come. */
  notifyResponseByteRead(): void {}

  close(): void {
    this.#isClosed = true;
    // With an error: by a mere code the calls under way would wait for their deadlines.
    for (const session of this.#live) session.destroy(closed(), constants.NGHTTP2_CANCEL);
  }

  /** The next request opens another, unless somebody has already. */
  #drop(broken: Promise<ClientHttp2Session>): void {
    if (this.#current === broken) this.#current = undefined;
  }

  async #open(): Promise<ClientHttp2Session> {
    const { authority, certificateFingerprint: pin, connectTimeoutMs } = this.#options;
    try {
      const socket =
        pin === undefined ? undefined : await connectPinned(new URL(authority), pin, connectTimeoutMs);
      const session = connect(authority, {
        settings: { initialWindowSize: STREAM_WINDOW_BYTES },
        ...(socket && { createConnection: () => socket }),
      });
      this.#live.add(session);
      session.once("close", () => this.#live.delete(session));
      // It only finishes what it began; the next request finds it closed.
      session.once("goaway", () => session.close());
      await connected(session, connectTimeoutMs);
      session.setLocalWindowSize(CONNECTION_WINDOW_BYTES);
      if (this.#isClosed) session.destroy();
      this.#keepAlive(session);
      return session;
    } catch (cause) {
      throw unreachable(cause);
    }
  }

  #keepAlive(session: ClientHttp2Session): void {
    const { pingIntervalMs, pingTimeoutMs } = this.#options;
    let unanswered: NodeJS.Timeout | undefined;
    const interval = setInterval(() => {
      if (unanswered || session.destroyed) return;
      unanswered = setTimeout(() => {
        session.destroy(timedOut("the host answers no ping"));
      }, pingTimeoutMs).unref();
      // False, or an error: the session is going down, and `close` follows.
      session.ping(() => {
        clearTimeout(unanswered);
        unanswered = undefined;
      });
    }, pingIntervalMs).unref();
    session.once("close", () => {
      clearInterval(interval);
      clearTimeout(unanswered);
    });
  }
}

/** Settles with the session's first word; its error listener stays for the last. */
async function connected(session: ClientHttp2Session, timeoutMs: number): Promise<void> {
  const { promise, resolve, reject } = Promise.withResolvers<void>();
  const tooLate = setTimeout(
    () => session.destroy(timedOut("the host takes no connection in time")),
    timeoutMs,
  );
  session.once("connect", () => resolve());
  session.on("error", reject);
  session.once("close", () => reject(new Error("the connection closed")));
  try {
    await promise;
  } finally {
    clearTimeout(tooLate);
  }
}

function isUsable(session: ClientHttp2Session): boolean {
  return !session.closed && !session.destroyed;
}

/** With the code that every layer above takes for a connection that failed. */
function timedOut(words: string): Error {
  return Object.assign(new Error(words), { code: "ETIMEDOUT" });
}

function closed(): Error {
  return Object.assign(new Error("the client was closed"), { code: "ECONNABORTED" });
}

function unreachable(cause: unknown): RookeryError {
  return new RookeryError("host_unreachable", "The sandbox's host can't be reached; try again shortly.", {
    cause,
  });
}
