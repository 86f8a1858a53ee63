/**
 * TLS to an agent's own certificate: no authority vouches for it, the host gave
 * its SHA-256 when it registered, and no other is spoken to.
 *
 * The certificate is compared before HTTP/2 learns of the connection, so a
 * stranger sees no request and no token. (Node 24 aborts the whole process when
 * a socket is destroyed between its handshake and the session's set-up.)
 */
import { createHash, timingSafeEqual } from "node:crypto";
import { type TLSSocket, connect } from "node:tls";

export async function connectPinned(
  authority: URL,
  fingerprint: string,
  timeoutMs: number,
): Promise<TLSSocket> {
  const socket = connect({
    host: authority.hostname.replace(/^\[|\]$/g, ""),
    port: Number(authority.port || 443),
    ALPNProtocols: ["h2"],
    minVersion: "TLSv1.3",
    // No authority to ask: the pin below decides.
    rejectUnauthorized: false,
  });
  socket.setTimeout(timeoutMs, () => {
    socket.destroy(Object.assign(new Error("the host shakes no hands in time"), { code: "ETIMEDOUT" }));
  });
  try {
    await new Promise<void>((resolve, reject) => {
      socket.once("secureConnect", resolve);
      socket.once("error", reject);
      socket.once("close", () => reject(new Error("the host closed the connection")));
    });
  } catch (cause) {
    socket.destroy();
    throw cause;
  }
  const shown = createHash("sha256").update(socket.getPeerX509Certificate()?.raw ?? "");
  if (timingSafeEqual(shown.digest(), Buffer.from(fingerprint, "hex"))) return socket.setTimeout(0);
  socket.on("error", () => undefined).destroy();
  throw new Error("the host shows another certificate than it registered");
}
