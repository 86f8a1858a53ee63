/**
 * Names that no clone of this guest will make too.
 *
 * node:crypto draws from OpenSSL's generator, whose state was frozen with the
 * template and is equal in all clones. The kernel's was reseeded by /init.
 */
import { closeSync, openSync, readSync } from "node:fs";

export function randomHex(bytes: number): string {
  const buffer = Buffer.alloc(bytes);
  const urandom = openSync("/dev/urandom", "r");
  try {
    readSync(urandom, buffer, 0, bytes, null);
  } finally {
    closeSync(urandom);
  }
  return buffer.toString("hex");
}
