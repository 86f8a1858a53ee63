/**
 * Stands in for a guest (or for a server somewhere): run inside a namespace, it
 * says who called it and tries to reach others.
 *
 *   GET /who                     address of the caller
 *   GET /tcp?to=A:P&from=A       "connected", or the error's code, or "timeout"
 *   GET /udp?to=A:P              what came back, or "timeout"
 *
 * usage: node guest-probe.ts TCP-PORT [ADDRESS-OF-AN-ECHO-ON-UDP-PORT-53…]
 */
import { createSocket } from "node:dgram";
import { once } from "node:events";
import { createServer } from "node:http";
import { connect } from "node:net";

const PATIENCE_MS = 700;
const [, , tcpPort = "0", ...echoes] = process.argv;

async function tryTcp(to: string, from: string | undefined): Promise<string> {
  const [host = "", port = ""] = to.split(":");
  return new Promise((resolve) => {
    const socket = connect({ host, port: Number(port), localAddress: from });
    const timer = setTimeout(() => done("timeout"), PATIENCE_MS);
    const done = (verdict: string): void => {
      clearTimeout(timer);
      socket.destroy();
      resolve(verdict);
    };
    socket.once("connect", () => done("connected"));
    socket.once("error", (error: NodeJS.ErrnoException) => done(error.code ?? error.message));
  });
}

async function tryUdp(to: string): Promise<string> {
  const [host = "", port = ""] = to.split(":");
  const socket = createSocket("udp4");
  return new Promise((resolve) => {
    const timer = setTimeout(() => done("timeout"), PATIENCE_MS);
    const done = (verdict: string): void => {
      clearTimeout(timer);
      socket.close();
      resolve(verdict);
    };
    socket.once("message", (message, from) => done(`${message.toString()} from ${from.address}`));
    socket.once("error", (error) => done(error.message));
    socket.send("hello", Number(port), host);
  });
}

createServer((request, response) => {
  const url = new URL(request.url ?? "/", "http://probe");
  const to = url.searchParams.get("to") ?? "";
  const answer =
    url.pathname === "/tcp"
      ? tryTcp(to, url.searchParams.get("from") ?? undefined)
      : url.pathname === "/udp"
        ? tryUdp(to)
        : Promise.resolve(request.socket.remoteAddress ?? "");
  void answer.then((text) => response.end(text));
}).listen(Number(tcpPort), "0.0.0.0", () => {
  void Promise.all(echoes.map(startEcho)).then(() => process.stdout.write("ready\n"));
});

/** One for each address, since an answer must come from the address that was asked. */
async function startEcho(address: string): Promise<void> {
  const echo = createSocket("udp4");
  echo.on("message", (message, from) =>
    echo.send(`${message.toString()} of ${from.address}`, from.port, from.address),
  );
  echo.bind(53, address);
  await once(echo, "listening");
}
