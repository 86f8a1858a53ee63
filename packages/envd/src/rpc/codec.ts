/** The two encodings of Connect's messages, and the content types that name them. */
import { create, fromBinary, fromJsonString, toBinary, toJsonString } from "@bufbuild/protobuf";
import type { DescMessage, MessageInitShape, MessageShape } from "@bufbuild/protobuf";
import { Code, ConnectError } from "@connectrpc/connect";
import { messageOf } from "../errors.ts";

export interface Codec {
  decode<D extends DescMessage>(schema: D, bytes: Uint8Array): MessageShape<D>;
  encode<D extends DescMessage>(schema: D, message: MessageInitShape<D>): Uint8Array;
}

const json: Codec = {
  decode(schema, bytes) {
    try {
      // Fields that we do not know are for a newer envd to understand.
      return fromJsonString(
        schema,
        Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength).toString(),
        {
          ignoreUnknownFields: true,
        },
      );
    } catch (error) {
      throw undecodable(error);
    }
  },
  encode: (schema, message) => Buffer.from(toJsonString(schema, create(schema, message))),
};

const binary: Codec = {
  decode(schema, bytes) {
    try {
      return fromBinary(schema, bytes, { readUnknownFields: false });
    } catch (error) {
      throw undecodable(error);
    }
  },
  encode: (schema, message) => toBinary(schema, create(schema, message)),
};

export interface ContentType {
  codec: Codec;
  stream: boolean;
}

const CONTENT_TYPES: Readonly<Record<string, ContentType>> = {
  "application/json": { codec: json, stream: false },
  "application/proto": { codec: binary, stream: false },
  "application/connect+json": { codec: json, stream: true },
  "application/connect+proto": { codec: binary, stream: true },
};

/** Parameters (charset) say nothing here. Undefined: none of Connect's. */
export function parseContentType(header: string | undefined): ContentType | undefined {
  if (header === undefined) return undefined;
  const name = header.split(";", 1)[0]!.trim().toLowerCase();
  return Object.hasOwn(CONTENT_TYPES, name) ? CONTENT_TYPES[name] : undefined;
}

function undecodable(error: unknown): ConnectError {
  return new ConnectError(`cannot decode the message: ${messageOf(error)}`, Code.InvalidArgument);
}
