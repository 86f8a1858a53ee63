/** HTTP by hand over a socket, for what no client would send. */
import { once } from "node:events";
import type { AddressInfo, Socket } from "node:net";
import { connect } from "node:net";
import type { Api } from "../app.ts";

export async function listen(app: Api): Promise<number> {
  await app.listen({ host: "127.0.0.1", port: 0 });
  return (app.server.address() as AddressInfo).port;
}

export class RawConnection implements Disposable {
  readonly socket: Socket;
  readonly #chunks: Buffer[] = [];
  readonly #ended: Promise<void>;
  #isEnded = false;

  constructor(port: number) {
    this.socket = connect({ port, host: "127.0.0.1", allowHalfOpen: true });
    this.#ended = new Promise((resolve) => {
      const end = (): void => {
        this.#isEnded = true;
        resolve();
      };
      this.socket.on("end", end).on("close", end);
    });
    this.socket.on("data", (chunk: Buffer) => this.#chunks.push(chunk));
    // A reset is an end like others here: what came before it is what counts.
    this.socket.on("error", () => {});
  }

  get text(): string {
    return Buffer.concat(this.#chunks).toString("latin1");
  }

  /** Waits while the other side takes nothing; false when it is gone. */
  async send(data: string | Buffer): Promise<boolean> {
    if (this.#isEnded) return false;
    if (this.socket.write(data)) return true;
    await new Promise<void>((resolve) => {
      this.socket.once("drain", resolve);
      void this.#ended.then(() => {
        this.socket.off("drain", resolve);
        resolve();
      });
    });
    return !this.#isEnded;
  }

  /** All that came until the other side ended the connection. */
  async whole(): Promise<{ status: number; head: string; body: string }> {
    await this.#ended;
    return this.parsed();
  }

  /** One answer of a connection that stays open. */
  async answer(): Promise<{ status: number; head: string; body: string }> {
    for (;;) {
      const { head, body } = this.parsed();
      const length = Number(/^content-length: (\d+)/im.exec(head)?.[1] ?? Number.NaN);
      if (body.length >= length) return this.parsed();
      await once(this.socket, "data");
    }
  }

  parsed(): { status: number; head: string; body: string } {
    const [head = "", ...rest] = this.text.split("\r\n\r\n");
    return { status: Number(head.split(" ")[1]), head, body: rest.join("\r\n\r\n") };
  }

  [Symbol.dispose](): void {
    this.socket.destroy();
  }
}

export function requestHead(method: string, path: string, headers: Record<string, string | number>): string {
  const lines = Object.entries({ host: "localhost", ...headers }).map(
    ([name, value]) => `${name}: ${value}\r\n`,
  );
  return `${method} ${path} HTTP/1.1\r\n${lines.join("")}\r\n`;
}
