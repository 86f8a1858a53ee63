/**
 * Takes a migration stream from a VMM.
 *
 * QEMU 7.2 sends to `exec:` (which its sandbox forbids), to descriptors that
 * came by SCM_RIGHTS (which Node cannot send), and to Unix sockets: so the agent
 * listens in the run directory while, and only while, it expects a stream. Only
 * cold-booted VMs send one, before any user's code has run in them.
 */
import { constants } from "node:fs";
import { lchown, open, rm } from "node:fs/promises";
import { createServer, type Socket } from "node:net";
import { join } from "node:path";
import type { VmPlace } from "../vmm.ts";

const NAME = "stream.sock";
/** Relative: the VMM's working directory is its run directory, by whatever name it sees it. */
export const STREAM_URI = `unix:${NAME}`;

/** Runs `send`, which makes the VMM connect, and returns all that it sent. */
export async function receiveStream(
  place: VmPlace,
  maxBytes: number,
  send: () => Promise<void>,
  signal: AbortSignal,
): Promise<Buffer> {
  const path = join(place.runDir, NAME);
  await rm(path, { force: true });
  await using directory = await open(place.runDir, constants.O_RDONLY | constants.O_DIRECTORY);
  const received = Promise.withResolvers<Buffer>();
  received.promise.catch(() => undefined);
  const server = createServer((socket) => {
    collect(socket, maxBytes).then(received.resolve, received.reject);
  });
  const onAbort = (): void => received.reject(signal.reason);
  signal.addEventListener("abort", onAbort, { once: true });
  try {
    await new Promise<void>((resolve, reject) => {
      server.once("error", reject);
      // By the directory's descriptor: the path itself may be longer than a socket's address.
      server.listen(`/proc/self/fd/${directory.fd}/${NAME}`, resolve);
    });
    server.on("error", received.reject);
    await lchown(path, place.uid, place.uid);
    await send();
    return await received.promise;
  } finally {
    signal.removeEventListener("abort", onAbort);
    server.close();
    await rm(path, { force: true });
  }
}

async function collect(socket: Socket, maxBytes: number): Promise<Buffer> {
  const chunks: Buffer[] = [];
  let bytes = 0;
  for await (const chunk of socket as AsyncIterable<Buffer>) {
    bytes += chunk.length;
    if (bytes > maxBytes) throw new Error(`the VMM sent more than ${maxBytes} bytes`);
    chunks.push(chunk);
  }
  return Buffer.concat(chunks);
}
