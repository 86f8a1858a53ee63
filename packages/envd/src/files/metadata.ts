/**
 * Metadata of a file: what an upload's X-Metadata-KEY headers said, kept as
 * extended attributes `user.e2b.KEY` (the names are E2B's, so its tools find them).
 */
import type { IncomingHttpHeaders } from "node:http";
import { HttpError } from "../errors.ts";
import { MAX_METADATA_BYTES, MAX_METADATA_KEY_BYTES } from "../limits.ts";
import type { Native } from "../system/native.ts";

const HEADER_PREFIX = "x-metadata-";
const XATTR_PREFIX = "user.e2b.";

export type Metadata = Record<string, string>;

export function parseMetadata(headers: IncomingHttpHeaders): Metadata {
  const metadata: Metadata = {};
  let bytes = 0;
  for (const [header, value] of Object.entries(headers)) {
    if (!header.startsWith(HEADER_PREFIX)) continue;
    const key = header.slice(HEADER_PREFIX.length);
    const text = Array.isArray(value) ? value.join(", ") : (value ?? "");
    if (key === "" || key.length > MAX_METADATA_KEY_BYTES) {
      throw new HttpError(400, `metadata key must have 1 to ${MAX_METADATA_KEY_BYTES} bytes`);
    }
    if (!/^[\x20-\x7e]*$/.test(text)) {
      throw new HttpError(400, `metadata value of '${key}' must be printable ASCII`);
    }
    bytes += key.length + text.length;
    metadata[key] = text;
  }
  if (bytes > MAX_METADATA_BYTES) throw new HttpError(400, `metadata exceeds ${MAX_METADATA_BYTES} bytes`);
  return metadata;
}

export function writeMetadata(fd: number, metadata: Metadata, native: Native): void {
  for (const [key, value] of Object.entries(metadata)) {
    native.setXattr(fd, XATTR_PREFIX + key, Buffer.from(value, "latin1"));
  }
}

export function readMetadata(path: string, native: Native): Metadata {
  const metadata: Metadata = {};
  for (const name of native.listXattrs(path)) {
    if (!name.startsWith(XATTR_PREFIX)) continue;
    const value = native.getXattr(path, name);
    if (value !== undefined) metadata[name.slice(XATTR_PREFIX.length)] = value.toString("utf8");
  }
  return metadata;
}
