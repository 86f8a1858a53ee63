/** Ends when the caller went away before it had its answer. */
import type { FastifyReply } from "fastify";

export class ClientGone extends Error {
  override readonly name = "ClientGone";
}

export function clientSignal({ raw }: FastifyReply): AbortSignal {
  const controller = new AbortController();
  const end = (): void => {
    if (!raw.writableFinished) controller.abort(new ClientGone("the caller closed the connection"));
  };
  if (raw.destroyed) end();
  else raw.once("close", end);
  return controller.signal;
}
