/**
 * What a command wrote, as JSON can carry it: text when both streams are UTF-8,
 * else base64 of both.
 */
import { isUtf8 } from "node:buffer";
import type { z } from "zod";
import type { ExecResult } from "../service/services.ts";
import type { ExecAnswer } from "./schemas/sandboxes.ts";

export function renderExec(result: ExecResult): z.output<typeof ExecAnswer> {
  const stdout = bufferOf(result.stdout, result.truncated);
  const stderr = bufferOf(result.stderr, result.truncated);
  const encoding = isUtf8(stdout) && isUtf8(stderr) ? "utf-8" : "base64";
  return {
    stdout: stdout.toString(encoding),
    stderr: stderr.toString(encoding),
    exit_code: result.exitCode,
    signal: result.signal,
    timed_out: result.timedOut,
    truncated: result.truncated,
    duration_ms: Math.round(result.durationMs),
    encoding,
  };
}

/** The cut of a truncated stream may have halved a character: its rest must not turn all the text into base64. */
function bufferOf(bytes: Uint8Array, truncated: boolean): Buffer {
  const buffer = Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  return truncated ? buffer.subarray(0, buffer.length - halfCharacterAtEnd(buffer)) : buffer;
}

function halfCharacterAtEnd(buffer: Buffer): number {
  for (let back = 1; back <= Math.min(3, buffer.length); back += 1) {
    const byte = buffer[buffer.length - back] ?? 0;
    if ((byte & 0b1100_0000) === 0b1000_0000) continue;
    const wanted = byte >= 0xf0 ? 4 : byte >= 0xe0 ? 3 : byte >= 0xc0 ? 2 : 1;
    return wanted > back ? back : 0;
  }
  return 0;
}
